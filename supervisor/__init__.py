"""What the master process is made of; see docs/design.md for how the parts fit together."""
