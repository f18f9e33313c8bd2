#!/bin/bash
# Puts gpud into a file system: its own Python environment, the command, its manual and completions, and what
# systemd, udev and the kernel's module loader must know. `make install` and the Debian package are made of this.
#
# Nothing outside DESTDIR is changed, but for pip's cache. What was installed is listed in
# PREFIX/lib/gpud/files, for `make uninstall`.
set -euo pipefail
umask 022

usage() {
  cat <<USAGE
usage: ${0##*/} [--help] PYTHON PREFIX [DESTDIR]
  PYTHON   the interpreter gpud shall run with: 3.11 or later, with venv
  PREFIX   where gpud will find itself: /usr/local, or /usr for packages
  DESTDIR  where that prefix lies for now; without it, the root directory
USAGE
}

case ${1-} in
  --help | -h) usage; exit 0 ;;
  '' | -*) usage >&2; exit 2 ;;
esac
[[ $# -ge 2 && $# -le 3 && $2 == /* ]] || { usage >&2; exit 2; }
# Not a link that a distribution's next release lets point elsewhere: /usr/bin/python3.11, not python3.
python=$("$1" -c 'import os, sys; assert sys.version_info >= (3, 11); print(os.path.realpath(sys.executable))')
prefix=$2
root=${3-}
here=$(dirname -- "$(realpath -- "$0")")
repository=$(dirname -- "$here")
lib=$prefix/lib/gpud          # as gpud will see it

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" gpud-install.XXXXXX)
trap 'rm -rf -- "$work"' EXIT
trap 'exit 1' HUP INT TERM
stage=$work/stage

say() { printf 'install: %s\n' "$*" >&2; }

# The environment is made in its final shape elsewhere: what is in the way there is removed, not mixed with.
say "Python packages for $python"
"$python" -m venv "$work/pip"
"$python" -m venv --without-pip "$stage$lib"
# What pip builds, it keeps for any interpreter of that version; what another one's library path is in is no good.
if cache=$("$work/pip/bin/pip" cache dir 2>/dev/null); then # not where it is switched off
  export PIP_CACHE_DIR=$cache/gpud${python//\//-}
fi
"$work/pip/bin/pip" -qq --disable-pip-version-check --python "$stage$lib/bin/python3" install \
  --no-compile --no-warn-script-location --prefer-binary "$repository"
# What tells of the machine that built it, and commands of others.
sed -i '/^command = /d' "$stage$lib/pyvenv.cfg"
find "$stage$lib/bin" -type f -delete
rm -rf "$stage$lib/include" "$stage$lib/share"
find "$stage$lib/lib" \( -name RECORD -o -name direct_url.json -o -name REQUESTED \) -delete
find "$stage$lib/lib" -name '*.so' -exec strip --strip-unneeded {} +
# Isolated (-I): neither the caller's environment nor the working directory decides what is imported.
cat >"$stage$lib/bin/gpud" <<LAUNCHER
#!$lib/bin/python3 -I
from gpud.cli import main

main(prog_name="gpud")
LAUNCHER
chmod 0755 "$stage$lib/bin/gpud"
# Here rather than where it is installed: there it takes longer than all the rest, and the daemon's user could not keep
# its own. It holds no dates, and where the file will be.
"$python" -I -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$stage" -p / "$stage$lib/lib"
mkdir -p "$stage$prefix/bin"
ln -s "../lib/gpud/bin/gpud" "$stage$prefix/bin/gpud"

say "manual and completions"
staged() { "$stage$lib/bin/python3" -I -B "$@"; }
share=$stage$prefix/share
mkdir -p "$work/man" "$share/man/man1" "$share/man/man5"
staged "$here/manual.py" "$work/man"
gzip -9n <"$work/man/gpud.1" >"$share/man/man1/gpud.1.gz"
gzip -9n <"$work/man/gpud.yaml.5" >"$share/man/man5/gpud.yaml.5.gz"
complete() {  # SHELL FILE
  mkdir -p "$share/${2%/*}"
  _GPUD_COMPLETE=${1}_source staged "$stage$lib/bin/gpud" >"$share/$2"
}
# Debian's zsh looks for what packages bring in a place of its own.
zsh=zsh/site-functions
[[ $prefix != /usr ]] || zsh=zsh/vendor-completions
complete bash bash-completion/completions/gpud
complete zsh "$zsh/_gpud"
complete fish fish/vendor_completions.d/gpud.fish

say "files for systemd, udev and the kernel"
place() { install -D -m "$1" "$here/$2" "$stage$3"; }
place 0644 gpud.service "$prefix/lib/systemd/system/gpud.service"
sed -i "s,/usr/bin/gpud,$prefix/bin/gpud," "$stage$prefix/lib/systemd/system/gpud.service"
place 0644 gpud.sysusers.conf "$prefix/lib/sysusers.d/gpud.conf"
place 0644 gpud.tmpfiles.conf "$prefix/lib/tmpfiles.d/gpud.conf"
place 0644 gpud.modules-load.conf "$prefix/lib/modules-load.d/gpud.conf"
place 0644 71-gpud.rules "$prefix/lib/udev/rules.d/71-gpud.rules"
place 0644 ../config/minimal.yaml "$lib/minimal.yaml"
place 0755 prepare.sh "$lib/prepare"

say "documents"
for file in README.md CHANGELOG.md ARCHITECTURE.md LICENSE; do
  place 0644 "../$file" "$prefix/share/doc/gpud/$file"
done
for file in "$repository"/docs/*.md "$repository"/docs/examples/*; do
  place 0644 "../${file#"$repository"/}" "$prefix/share/doc/gpud/${file#"$repository"/}"
done
for file in gpud.yaml prometheus-alerts.yaml grafana-dashboard.json; do
  place 0644 "../config/$file" "$prefix/share/doc/gpud/examples/$file"
done

chmod -R u=rwX,go=rX "$stage"
(cd "$stage" && find . \( -type f -o -type l \) -printf '/%P\n' | sort) >"$work/files"
install -m 0644 "$work/files" "$stage$lib/files"
rm -rf -- "$root$lib"
mkdir -p "$root/"
# Directories that are there keep their modes, and may be links.
tar -C "$stage" -c . | tar -C "$root/" -x --no-overwrite-dir --keep-directory-symlink
