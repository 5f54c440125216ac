#!/bin/sh
# Starts a program once the clock is good, in its own place.
#
#   wait_for_clock.sh [-t SECONDS] [-s STATUS-SOCKET] COMMAND [ARGUMENT...]
#
# -t  give up after so long [30]; the command is not started then
# -s  the daemon's status socket [/run/vmclock-refclock/status.sock]
#
# Ends with the command's own status; else with that of `vmclock-refclock wait`: 1 when the clock was not good in time,
# 69 when there is no daemon, 64 for a wrong command line.
set -eu

usage() {
	echo "usage: wait_for_clock.sh [-t SECONDS] [-s STATUS-SOCKET] COMMAND [ARGUMENT...]" >&2
	exit 64
}

timeout=30
socket=/run/vmclock-refclock/status.sock
while getopts t:s: option; do
	case $option in
	t) timeout=$OPTARG ;;
	s) socket=$OPTARG ;;
	*) usage ;;
	esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || usage

vmclock-refclock wait --timeout "$timeout" --status "$socket"
exec "$@"
