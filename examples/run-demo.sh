#!/bin/sh
# The demo, in the commands that one would type: start the daemon, run a Perl script that needs it on
# the shipped file or on the one named here, look at the daemon, stop it.
# Usage: run-demo.sh [FILE]. Exit status: the script's, or that of the step that failed.

case ${1-} in
    '' | /*) file=${1-} ;;
    *) file=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.." || exit
PATH=$PATH:$PWD/.venv/bin
file=${file#"$PWD/"}
case $file in
    '') file=examples/orders.csv ;;
    -*) file=./$file ;;
esac

if ! command -v cpanbridged >/dev/null; then
    echo 'run-demo.sh: cpanbridged is not installed; "make demo" does all that is needed' >&2
    exit 1
fi

clean_up() {
    status=$?
    trap '' HUP INT PIPE TERM
    if cpanbridged status >/dev/null 2>&1; then
        run cpanbridged stop
    fi
    case $status in
        0 | 129 | 130 | 141 | 143) ;; # done, or told to end
        *) printf '\nThe demo failed with status %s. The daemon wrote to its log:\n' "$status" >&2
            cat "$folder/daemon.log" >&2 ;;
    esac
    rm -rf "$folder"
    exit "$status"
}

run() {
    {
        printf '\n$'
        for word; do
            case $word in
                *[!A-Za-z0-9_./=-]*) printf " '%s'" "$(printf %s "$word" | sed "s/'/'\\\\''/g")" ;;
                *) printf ' %s' "$word" ;;
            esac
        done
        echo
    } 2>/dev/null # should nobody read on
    "$@"
}

# Not to be interrupted, which takes a second: a daemon that isn't there yet could not be stopped.
trap '' HUP INT TERM
folder=$(mktemp -d "${TMPDIR:-/tmp}/cpanbridged-demo.XXXXXX") || exit # with mode 0700
trap clean_up EXIT
export CPAN_BRIDGE_SOCKET="$folder/daemon.sock"
printf '$ export CPAN_BRIDGE_SOCKET=%s\n' "$CPAN_BRIDGE_SOCKET"
run cpanbridged start --config examples/demo.toml || exit
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exec >/dev/null; exit 141' PIPE
trap 'exit 143' TERM

run perl examples/sales_report.pl "$file"
status=$?
run cpanbridged status
exit "$status"
