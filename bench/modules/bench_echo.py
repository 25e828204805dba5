"""The module that the benchmarks call: the least that a real, configured module can do."""


def echo(**params: object) -> dict[str, object]:
    """Give the keyword arguments back."""
    return params
