#!/bin/sh
# Installs the servers that stand in for clouds in the tests of `recvirt publish`: some from Debian (as root, after asking, as
# scripts/bootstrap.sh does), the rest into .cache/publish-servers. What is there is left alone.
#
#   scripts/publish-servers.sh          ask before root is used
#   YES=1 scripts/publish-servers.sh    don't ask (CI)
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
home=${RECVIRT_PUBLISH_SERVERS:-$top/.cache/publish-servers}
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }
die() { say "publish-servers: $*"; exit 4; }

missing=
for pair in docker-registry:docker-registry rclone:rclone apache2:apache2-bin qemu-img:qemu-utils virsh:libvirt-clients \
    libvirtd:libvirt-daemon-system skopeo:skopeo npm:npm virt-index-validate:guestfs-tools xmllint:libxml2-utils; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
if [ -n "$missing" ]; then
    say "The tests' servers want:$missing"
    if [ "${YES:-}" != 1 ]; then
        [ -t 0 ] || die "not asked: there is no terminal; run it again with YES=1"
        printf 'Install them with apt-get? [y/N] ' >&2
        read -r answer
        case $answer in [yY]*) ;; *) die "nothing was installed" ;; esac
    fi
    root=
    [ "$(id -u)" -eq 0 ] || root=sudo
    # shellcheck disable=SC2086 # package names are words
    $root env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get -q update && apt-get -q install -y --no-install-recommends "$@"' sh $missing ||
        die "apt-get failed: see its words above"
fi

want=$(cat "$0")
[ ! -f "$home/.made" ] || [ "$(cat "$home/.made")" != "$want" ] || exit 0
say "Making $home ..."
python3 -m venv "$home"
"$home/bin/pip" install --quiet --disable-pip-version-check 'moto[server,s3,ec2]>=5.2' 'gcp-storage-emulator' 'glance' 'gunicorn' 'google-api-python-client' ||
    die "pip failed: see its words above"
(cd "$home" && npm install --silent --no-fund --no-audit azurite@3) || die "npm failed: see its words above"
printf '%s\n' "$want" >"$home/.made"
