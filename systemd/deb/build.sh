#!/bin/bash
# Builds the Debian package of gpud, for the distribution it is run on: the package's Python environment fits the
# interpreter of that distribution alone.
#
# The same commit with the same versions of its dependencies makes the same package, byte for byte.
set -euo pipefail
umask 022

usage() {
  cat <<USAGE
usage: ${0##*/} [--help] [DIRECTORY]
  DIRECTORY  where the package goes; without it, dist/ of the repository
  VERSION    (environment) the package's version, where it is not pyproject.toml's
  PYTHON     (environment) the interpreter it shall run with; without it, /usr/bin/python3
  Needs dpkg-dev, python3-venv, binutils, and to build libvirt's bindings libvirt-dev, python3-dev, gcc, pkg-config.
USAGE
}

case ${1-} in
  --help | -h) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac
here=$(dirname -- "$(realpath -- "$0")")
repository=$(dirname -- "$(dirname -- "$here")")
out=$(realpath -m -- "${1:-$repository/dist}")
version=${VERSION:-$(sed -n 's/^version = "\(.*\)"$/\1/p' "$repository/pyproject.toml")}
architecture=$(dpkg --print-architecture)
# Of the last commit: dates in the package and its manual are those of its content.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$repository" log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" gpud-deb.XXXXXX)
trap 'rm -rf -- "$work"' EXIT
trap 'exit 1' HUP INT TERM
root=$work/debian/gpud           # where dpkg-shlibdeps looks

"$repository/systemd/install.sh" "${PYTHON:-/usr/bin/python3}" /usr "$root"
environment=$root/usr/lib/gpud
rm "$environment/files"       # dpkg knows

documents=$root/usr/share/doc/gpud
rm "$documents/LICENSE"
cp "$here/copyright" "$documents/copyright"
"$environment/bin/python3" -IB - >>"$documents/copyright" <<'LIST'
from importlib.metadata import distributions

found = {one.metadata["Name"]: one for one in distributions()}
for name in sorted(set(found) - {"gpud"}, key=str.lower):
    told = found[name].metadata
    kinds = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier", []) if line.startswith("License ::")]
    print(f"  {name} {found[name].version}: {told['License-Expression'] or ', '.join(kinds) or told['License']}")
LIST
printf 'gpud (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- gpud <gpud@gpu.invalid>  %s\n' \
  "$version" "$(LC_ALL=C date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")" | gzip -9n >"$documents/changelog.gz"
install -D -m 0644 "$here/lintian-overrides" "$root/usr/share/lintian/overrides/gpud"

# What the environment's C code needs, in the names and versions of this distribution's packages.
printf 'Source: gpud\n\nPackage: gpud\nArchitecture: any\n' >"$work/debian/control"
mapfile -t binaries < <(find "$environment" -name '*.so*' -type f | sort)
libraries=$(cd "$work" && dpkg-shlibdeps -O "${binaries[@]/#/-e}" 2>warnings | sed -n 's/^shlibs:Depends=//p') ||
  { cat "$work/warnings" >&2; exit 1; }
# As /usr/lib/gpud/bin/python3 names it: python3.11.
python=$(basename -- "$(readlink -f "$environment/bin/python3")")

mkdir -m 0755 "$root/DEBIAN"
sed -e "s/@VERSION@/$version/; s/@ARCHITECTURE@/$architecture/; s/@PYTHON@/$python/" \
  -e "s/@LIBRARIES@/$libraries/; s/@INSTALLED_SIZE@/$(du -k -s --apparent-size "$root" | cut -f1)/" \
  "$here/control" >"$root/DEBIAN/control"
for script in preinst postinst prerm postrm; do
  install -m 0755 "$here/$script" "$root/DEBIAN/$script"
done
(cd "$root" && find usr -type f -printf '%P\0' | sort -z | (cd usr && xargs -0 md5sum) | sed 's,  ,  usr/,') \
  >"$root/DEBIAN/md5sums"
chmod 0644 "$root/DEBIAN/md5sums" "$root/DEBIAN/control"
find "$root" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +

mkdir -p -- "$out"
package=$out/gpud_${version}_$architecture.deb
dpkg-deb --root-owner-group --build "$root" "$package" >/dev/null
printf '%s\n' "$package"
