#!/bin/sh
# Proves the README's commands on a machine with nothing installed: a new Debian tree becomes the root of a private mount
# namespace (pivot_root(8), so that user namespaces work inside as on a real machine), gets this checkout's HEAD as a
# clone, and runs what it is told. Needs root on the outside. Nothing is left behind but the log.
#
#   scripts/fresh-host.sh SUITE root|user [COMMAND]      COMMAND defaults to: make image YES=1
#   KEEP_CACHE=DIR                                       share a cache folder with it (else it starts cold)
set -eu
suite=${1:?usage: fresh-host.sh SUITE root|user [COMMAND]}
who=${2:?usage: fresh-host.sh SUITE root|user [COMMAND]}
command=${3:-make image YES=1}
[ "$(id -u)" = 0 ] || { echo "fresh-host.sh: needs root" >&2; exit 1; }
checkout=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d "${TMPDIR:-/var/tmp}/fresh-host.XXXXXX")
trap 'rm -rf --one-file-system "$place"' EXIT INT TERM

echo "== a new $suite tree in $place"
mmdebstrap --quiet --variant=minbase --include=make,git,ca-certificates,sudo "$suite" "$place/tree"
# What this machine trusts, a new one at the same site would trust too.
if ls /usr/local/share/ca-certificates/*.crt >/dev/null 2>&1; then
    cp /usr/local/share/ca-certificates/*.crt "$place/tree/usr/local/share/ca-certificates/"
    chroot "$place/tree" update-ca-certificates >/dev/null
fi
git clone --quiet --no-local "$checkout" "$place/tree/src"
if [ -n "${KEEP_CACHE:-}" ]; then mkdir -p "$KEEP_CACHE" "$place/tree/cache"; fi

export place who command
unshare --mount --pid --fork --kill-child -- sh -euc '
    tree=$place/tree
    mount --bind "$tree" "$tree"
    mount -t proc proc "$tree/proc"
    mount --rbind /dev "$tree/dev"
    mount -t tmpfs tmpfs "$tree/tmp"; chmod 1777 "$tree/tmp"
    cp /etc/resolv.conf "$tree/etc/resolv.conf"; cp /etc/hosts "$tree/etc/hosts"
    [ -z "${KEEP_CACHE:-}" ] || mount --bind "$KEEP_CACHE" "$tree/cache"
    mkdir -p "$tree/.old"
    cd "$tree"; pivot_root . .old; umount -l /.old; rmdir /.old
    cache=""; [ -z "${KEEP_CACHE:-}" ] || cache="RECVIRT_CACHE_DIR=/cache"
    if [ "$who" = root ]; then
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root $cache sh -c "cd /src && $command"
    fi
    useradd --create-home --shell /bin/sh user
    echo "user ALL=(ALL) NOPASSWD: ALL" >/etc/sudoers.d/user
    chown -R user /src; [ -z "$cache" ] || chown user /cache
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin setpriv --reuid user --regid user --init-groups \
        env HOME=/home/user USER=user LOGNAME=user $cache sh -c "cd /src && $command"
'
