#!/bin/bash
# Takes away what install.sh put below PREFIX. The configuration, the state and the guests stay.
set -euo pipefail

usage() { echo "usage: ${0##*/} [--help] PREFIX [DESTDIR]"; }

case ${1-} in
  --help | -h) usage; exit 0 ;;
  /*) ;;
  *) usage >&2; exit 2 ;;
esac
root=${2-}
lib=$root$1/lib/gpud
[[ -f $lib/files ]] || { echo "uninstall: nothing is installed in $root$1" >&2; exit 1; }
if [[ -z $root && -d /run/systemd/system ]]; then
  systemctl disable --now --quiet gpud.service || true
fi
while IFS= read -r file; do
  rm -f -- "$root$file"
done <"$lib/files"
rm -rf -- "$lib"
rmdir --ignore-fail-on-non-empty -- "$root$1/share/doc/gpud/"{docs/examples,docs,examples} "$root$1/share/doc/gpud"
if [[ -z $root && -d /run/systemd/system ]]; then
  systemctl daemon-reload
  udevadm control --reload
fi
echo "uninstall: /etc/gpud, /var/lib/gpud and user gpud stay" >&2
