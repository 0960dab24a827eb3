#!/bin/sh
# Finds out what this machine lacks for building images, and installs it after asking. What is there is left alone;
# with nothing missing nothing is run as root. Then it makes the virtual environment in .venv.
#
#   scripts/bootstrap.sh          ask before root is used
#   YES=1 scripts/bootstrap.sh    don't ask (CI)
#   DEV=1 scripts/bootstrap.sh    also what `make check` needs: linters, type checker, test tools, libvirt's headers
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
list=$top/recvirt/resources/host-packages.txt
venv=${VENV:-$top/.venv}
# An ordinary user's PATH often lacks sbin.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }
die() { say "bootstrap: $1"; [ $# -lt 2 ] || say "  next step: $2"; exit 4; }

has() {
    case $1 in
        module:*) command -v python3 >/dev/null 2>&1 && python3 -c "import ${1#module:}" >/dev/null 2>&1 ;;
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

missing_packages() {
    uid=$(id -u)
    while read -r package what who _rest; do
        case $package in ''|'#'*) continue ;; esac
        [ "$who" != user ] || [ "$uid" -ne 0 ] || continue
        [ "$who" != check ] || [ "${DEV:-}" = 1 ] || continue
        has "$what" || echo "$package"
    done <"$list" | sort -u
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -- "$@"
    fi
}

# Proxies reach apt through sudo only when they are named.
apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
        ${no_proxy:+no_proxy="$no_proxy"} apt-get "$@"
}

install_packages() {
    # shellcheck disable=SC2086 # package names are words
    set -- $1
    command -v apt-get >/dev/null 2>&1 ||
        die "this machine lacks: $* (package names of Debian), and has no apt-get" "install them by other means, or use Debian 12 or newer"
    if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null 2>&1; then
        die "missing: $*, and there is no sudo" "as root: apt-get install --no-install-recommends $*"
    fi
    say "This machine lacks: $*"
    if [ "${YES:-}" != 1 ]; then
        [ -t 0 ] || die "not asked: there is no terminal" "run it again with YES=1, or as root: apt-get install --no-install-recommends $*"
        printf 'Install them with apt-get%s? [y/N] ' "$([ "$(id -u)" -eq 0 ] || echo ' through sudo')" >&2
        read -r answer
        case $answer in [yY]*) ;; *) die "nothing was installed" "apt-get install --no-install-recommends $*" ;; esac
    fi
    apt_get -q update || die "apt-get update failed" "check the network and /etc/apt/sources.list*"
    apt_get -q install -y --no-install-recommends "$@" || die "apt-get install failed" "see apt's words above"
}

make_venv() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$(python3 --version) is too old" "Python 3.11 or newer (Debian 12 or newer) is needed"
    kind=run
    [ "${DEV:-}" != 1 ] || kind=dev
    # The stamp is written last: a half-made environment is made again. It holds what was installed from.
    want=$(cat "$top/setup.cfg" "$top/pyproject.toml"; python3 --version; echo "$top")
    for stamp in "$venv/.made-$kind" "$venv/.made-dev"; do
        [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ] || return 0
    done
    say "Making the virtual environment in $venv ..."
    [ -f "$venv/.made-run" ] || [ -f "$venv/.made-dev" ] || python3 -m venv --clear "$venv"
    # A site's own authority is in the system's bundle (or the one that SSL_CERT_FILE names), not in pip's.
    bundle=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
    if [ -z "${PIP_CERT:-}" ] && [ -f "$bundle" ]; then PIP_CERT=$bundle && export PIP_CERT; fi
    extras=
    [ "$kind" = run ] || extras='[dev]'
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$top$extras" ||
        die "pip could not install recvirt" "check the network, the proxy and pip's settings (pip config list), then run it again"
    printf '%s\n' "$want" >"$venv/.made-$kind"
}

missing=$(missing_packages)
if [ -n "$missing" ]; then
    install_packages "$missing"
    missing=$(missing_packages)
    [ -z "$missing" ] || die "still missing after the installation: $(echo "$missing" | tr '\n' ' ')" "see apt's words above"
fi
make_venv
