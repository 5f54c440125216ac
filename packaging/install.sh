#!/bin/sh
# For a machine without the Debian package, once pip has installed the command: the units and what belongs to them.
#
#   packaging/install.sh                 with /usr/local/bin/vmclock-refclock, or wherever PATH has it
#   DESTDIR=/tmp/root packaging/install.sh /opt/vmclock-refclock/bin/vmclock-refclock
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=${DESTDIR:-}
command=${1:-$(command -v vmclock-refclock || echo /usr/local/bin/vmclock-refclock)}
case $command in
/home/* | /root/* | /tmp/*)
	echo "$command: the unit cannot see below /home, /root and /tmp; install it in /usr/local or /opt" >&2
	exit 64
	;;
esac

# put FILE DIRECTORY [NAME]: a copy that runs this command.
put() {
	mkdir -p "$root$2"
	sed "s|/usr/bin/vmclock-refclock|$command|" "$here/$1" >"$root$2/${3:-${1##*/}}"
}

put systemd/vmclock-refclock.service /etc/systemd/system
put systemd/vmclock-refclock-wait.service /etc/systemd/system
put systemd/vmclock-refclock.sysusers /etc/sysusers.d vmclock-refclock.conf
put systemd/vmclock-refclock.tmpfiles /etc/tmpfiles.d vmclock-refclock.conf
put udev/60-vmclock.rules /etc/udev/rules.d
for drop_in in "$here"/systemd/*.conf; do
	put "systemd/${drop_in##*/}" /usr/share/vmclock-refclock/systemd
done
[ -e "$root/etc/vmclock-refclock.toml" ] || put ../examples/vmclock-refclock.toml /etc
if [ -d "$root/etc/chrony/conf.d" ]; then
	put chrony/vmclock-refclock.conf /etc/chrony/conf.d
else
	echo "add to /etc/chrony.conf, and restart chronyd:"
	grep '^refclock' "$here/chrony/vmclock-refclock.conf"
fi
if [ -d "$root/etc/apparmor.d" ]; then
	put apparmor/vmclock-refclock /etc/apparmor.d
fi

[ -z "$root" ] || exit 0
systemd-sysusers
systemctl daemon-reload
udevadm control --reload
udevadm trigger --action=change --subsystem-match=misc --sysname-match='vmclock*'
if [ "$(cat /sys/fs/selinux/enforce 2>/dev/null)" = 1 ]; then
	echo "SELinux: semodule -i $here/selinux/vmclock-refclock.cil"
fi
echo "then: systemctl enable --now vmclock-refclock && $command doctor"
