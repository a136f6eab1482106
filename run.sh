#!/usr/bin/env bash
# One door to the project: sets up .venv when it has to, then runs a command inside it. ./run.sh help tells more.
set -euo pipefail

# The folder of the file itself, when it is called through symbolic links too. No readlink -f: older macOS has none.
SELF="${BASH_SOURCE[0]}"
while [ -L "$SELF" ]; do
  LINK="$(readlink -- "$SELF")"
  case "$LINK" in
    /*) SELF="$LINK" ;;
    *) SELF="$(dirname -- "$SELF")/$LINK" ;;
  esac
done
ROOT="$(cd -- "$(dirname -- "$SELF")" && pwd -P)"
VENV="$ROOT/.venv"
# A set-up works in $NEW and is swapped in when it is whole, so that one that fails leaves a working .venv as it was.
NEW="$ROOT/.cache/venv.new" # below .cache, where nothing but ours is
OLD="$ROOT/.cache/venv.old"
STAMP="in2core-stamp"                 # in both: what it was made from; written last, so only a whole set-up has it
UNFINISHED="$VENV/in2core-unfinished" # what a set-up of an older run.sh left when it was broken off
LOG="$ROOT/.cache/setup.log"
REQUIREMENTS="$ROOT/requirements.txt"
ASSETS="$ROOT/third_party/requirements-assets.txt"
DOCS_REQUIREMENTS="$ROOT/requirements-docs.txt"
DOCS_STAMP="in2core-docs" # in .venv: of which requirements-docs.txt it has the packages

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() {
  printf '%s\n' "$*" >&2
}

# The modules of experiments/ that run as programs.
experiments() {
  local file
  for file in "$ROOT"/experiments/*.py "$ROOT"/experiments/*/__main__.py; do
    if grep -qs '^if __name__ == "__main__":' "$file"; then
      case "$file" in
        */__main__.py) file="${file%/__main__.py}" ;;
      esac
      printf '%s\n' "$(basename -- "$file" .py)"
    fi
  done | sort | tr '\n' ' '
}

is_experiment() {
  local name
  for name in $(experiments); do
    if [ "$name" = "$1" ]; then return 0; fi
  done
  return 1
}

# The main commands with a line each, as `in2core-jax help` of an installed package shows them.
main_commands() {
  sed -n '/^MAIN = {/,/^}/s/^  "\([a-z]*\)": "\(.*\)",$/\1 \2/p' "$ROOT/experiments/console.py"
}

usage() {
  local name others="" main
  main="$(main_commands | while read -r name line; do printf '  %-10s %s\n' "$name" "$line"; done)"
  for name in $(experiments); do
    if ! grep -q "^  $name " <<<"$main"; then others="$others $name"; fi
  done
  cat <<EOF
usage: ./run.sh COMMAND [flags]

$main

  --help after a command lists its flags; these five and index take --dry_run, which tells what they would take.
  Paths are relative to where you are.

other commands and experiments (each is python -m experiments.NAME inside .venv):
 $others

the project:
  setup      create .venv and install the pinned requirements (every command does, when it has to)
  test       the tests (arguments go to pytest)
  lint       ruff check and ruff format --check
  docs       check the documentation and build its site into docs/_build
  help       this text

environment:
  IN2CORE_ACCELERATOR=cpu|cuda12|tpu   which JAX to install (default: what .venv has, else cpu)
  IN2CORE_PYTHON=PATH                  the Python (3.11 to 3.13) that .venv is made with
EOF
}

# Args: a word that is no command. Prints the command that it is like, where there is one and a Python to find it.
near_command() {
  # shellcheck disable=SC2046 -- one word a command
  "$VENV/bin/python" -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' \
    "$1" setup test lint docs help $(experiments) 2>/dev/null || true
}

# --- what .venv was made from ---------------------------------------------------------------------------------------

sha256() {
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

choose_accelerator() {
  local recorded=""
  if [ -f "$VENV/$STAMP" ]; then recorded="$(sed -n 's/^accelerator //p' "$VENV/$STAMP")"; fi
  ACCELERATOR="${IN2CORE_ACCELERATOR:-${recorded:-cpu}}"
  case "$ACCELERATOR" in
    cpu | cuda12 | tpu) ;;
    *) die "IN2CORE_ACCELERATOR is '$ACCELERATOR'; it must be cpu, cuda12 or tpu" ;;
  esac
}

# Args: the environment, here and below.
venv_python() {
  sed -n 's/^version *= *//p' "$1/pyvenv.cfg" 2>/dev/null
}

wanted_stamp() {
  printf 'python %s\n' "$(venv_python "$1")"
  printf 'accelerator %s\n' "$ACCELERATOR"
  printf 'requirements %s\n' "$(cat "$REQUIREMENTS" "$ASSETS" | sha256)"
}

is_ready() {
  [ -x "$VENV/bin/python" ] && [ -f "$VENV/pyvenv.cfg" ] && [ ! -e "$UNFINISHED" ] && [ -f "$VENV/$STAMP" ] &&
    [ "$(cat "$VENV/$STAMP")" = "$(wanted_stamp "$VENV")" ]
}

# --- set-up ---------------------------------------------------------------------------------------------------------

# Prints "MAJOR.MINOR PATH" of a Python that can make environments, "MAJOR.MINOR" of one that cannot; nothing if it does not start.
# -I here, and -P below: a file in the current folder, such as experiments/select.py, must not shadow the standard library.
probe_python() {
  "$1" -I -c 'import sys
try:
  import ensurepip, venv
  able = " " + sys.executable
except ImportError:
  able = ""
print("%d.%d%s" % (sys.version_info[0], sys.version_info[1], able))' 2>/dev/null || true
}

# Sets PYTHON. 3.12 and 3.11 come first because they are what the project is tested on.
find_python() {
  local candidate version path seen=""
  for candidate in ${IN2CORE_PYTHON:+"$IN2CORE_PYTHON"} python3.12 python3.11 python3.13 python3; do
    read -r version path <<<"$(probe_python "$candidate")"
    case "$version" in
      3.11 | 3.12 | 3.13)
        if [ -n "$path" ]; then
          PYTHON="$path"
          return
        fi
        seen="$seen, $candidate is $version but cannot make environments (on Debian: apt-get install python$version-venv)"
        ;;
      "") if [ -n "${IN2CORE_PYTHON:-}" ]; then seen=", $candidate does not start"; fi ;;
      *) seen="$seen, $candidate is $version" ;;
    esac
    if [ -n "${IN2CORE_PYTHON:-}" ]; then
      die "IN2CORE_PYTHON: ${seen#, }; Python 3.11, 3.12 or 3.13 with venv is needed"
    fi
  done
  seen="${seen#, }"
  die "no Python 3.11, 3.12 or 3.13 found (${seen:-none on PATH}): install one, or set IN2CORE_PYTHON to its path"
}

# Args: the GB that this set-up can take.
check_disk() {
  local free_kb
  free_kb="$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')"
  if [ "$free_kb" -lt $(($1 * 1000000)) ]; then
    die "disk full: the set-up needs about $1 GB in $ROOT and $((free_kb / 1000)) MB are free"
  fi
}

# Says why pip failed, in one line. Args: what was being installed.
explain_failure() {
  local last kept=""
  if [ -e "$VENV/bin/python" ] && [ -z "${INTO:-}" ]; then kept="; .venv is as it was"; fi
  last="$(grep '^ERROR:' "$LOG" | tail -n 1 | cut -c 1-300 || true)"
  if grep -qiE 'No space left on device|Disk quota exceeded' "$LOG"; then
    die "disk full while installing $1: free some space (${TMPDIR:-/tmp} and the pip cache count too) and run the same command again$kept"
  fi
  if grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Max retries exceeded|ProxyError|Connection(Reset)?Error|Temporary failure in name resolution|Network is unreachable' "$LOG"; then
    die "no network: pip cannot reach a package index to install $1; check the connection or pip's proxy settings, then run the same command again (log: $LOG)$kept"
  fi
  die "pip could not install $1: ${last:-no reason given} (log: $LOG)$kept"
}

# A line now and then while pip works; ends with the set-up, even when that is killed.
tick() {
  local seconds=0
  while sleep 1 && kill -0 "$$" 2>/dev/null; do
    seconds=$((seconds + 1))
    if [ -t 2 ]; then
      printf '\r  %d packages found, %d s ' "$(grep -c '^Collecting' "$LOG")" "$seconds" >&2
    elif [ $((seconds % 30)) -eq 0 ]; then
      say "  ... $(grep -c '^Collecting' "$LOG") packages found, $seconds s"
    fi
  done
}

# Args: what is installed (for messages), then pip's arguments.
pip_install() {
  local what="$1" code=0
  shift
  "${INTO:-$NEW}/bin/python" -P -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" >>"$LOG" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then explain_failure "$what"; fi
}

make_new() {
  find_python
  check_disk "$NEEDED_GB"
  say "setting up .venv with $PYTHON for $ACCELERATOR: installing about 90 packages, a few minutes the first time (log: $LOG)"
  "$PYTHON" -P -m venv --prompt .venv "$NEW" >>"$LOG" 2>&1 || {
    if grep -qi 'No space left on device' "$LOG"; then die "disk full while creating $NEW"; fi
    die "$PYTHON could not create $NEW: $(tail -n 1 "$LOG")"
  }
}

# True when pip can bring .venv up to date: it works, no set-up of it was broken off, and it was made for the same accelerator.
can_update() {
  [ -x "$VENV/bin/python" ] && [ ! -e "$UNFINISHED" ] && "$VENV/bin/python" -P -m pip --version >/dev/null 2>&1 || return 1
  if [ -f "$VENV/$STAMP" ]; then
    grep -qx "accelerator $ACCELERATOR" "$VENV/$STAMP" && grep -qx "python $(venv_python "$VENV")" "$VENV/$STAMP"
  fi
}

# A .venv without our stamp is somebody's own: used when it will do, never thrown away.
check_foreign_venv() {
  if [ -f "$VENV/$STAMP" ] || [ -e "$UNFINISHED" ] || [ -z "$(ls -A "$VENV" 2>/dev/null)" ]; then return; fi
  case "$(venv_python "$VENV")" in
    3.11.* | 3.12.* | 3.13.*) if can_update; then return; fi ;;
  esac
  die "$VENV was not made by run.sh and is not a working Python 3.11 to 3.13 environment with pip: move it away"
}

# The second half of the swap; also for a set-up that was killed in it: the new one is whole, or the old one is there.
finish_swap() {
  if [ ! -e "$VENV" ] && [ ! -L "$VENV" ]; then
    if [ -f "$NEW/$STAMP" ]; then
      mv -- "$NEW" "$VENV"
    elif [ -e "$OLD" ]; then
      mv -- "$OLD" "$VENV"
    fi
  fi
  rm -rf -- "$OLD"
}

# Scripts name the folder that they were installed in: activate, and the first line of bin/*.
rename_scripts() {
  "$NEW/bin/python" -c '
import pathlib, sys
old, new = (name.encode() for name in sys.argv[1:])
for file in pathlib.Path(sys.argv[1], "bin").iterdir():
  if file.is_file() and not file.is_symlink() and old in (content := file.read_bytes()):
    file.write_bytes(content.replace(old, new))
' "$NEW" "$VENV"
}

install_everything() {
  check_foreign_venv
  trap 'say "stopped; the next call starts the set-up again"; exit 130' INT TERM
  : >"$LOG"
  NEEDED_GB=3
  if [ "$ACCELERATOR" = cuda12 ]; then NEEDED_GB=10; fi
  rm -rf -- "$NEW"
  TICKER=""
  trap 'if [ -n "$TICKER" ]; then kill "$TICKER" 2>/dev/null || true; fi; rm -rf -- "$NEW"' EXIT
  if can_update; then
    check_disk "$NEEDED_GB"
    say "requirements are new or changed: bringing .venv up to date (log: $LOG)"
    cp -a -- "$VENV/." "$NEW" 2>>"$LOG" || die "could not copy .venv to $NEW: $(tail -n 1 "$LOG"); .venv is as it was"
    rm -f -- "$NEW/$STAMP"
  else
    make_new
  fi
  tick 9>&- &
  TICKER=$!
  local extra=()
  if [ "$ACCELERATOR" != cpu ]; then extra=("jax[$ACCELERATOR]"); fi # its version is the one that requirements.txt pins
  pip_install "requirements.txt" -r "$REQUIREMENTS" ${extra[@]+"${extra[@]}"}
  pip_install "third_party/requirements-assets.txt" --no-deps -r "$ASSETS"
  kill "$TICKER" 2>/dev/null || true
  TICKER=""
  rename_scripts
  wanted_stamp "$NEW" >"$NEW/$STAMP"
  trap - EXIT INT TERM
  # No single call swaps two folders. Killed between these renames, the next call finishes the swap.
  if [ -e "$VENV" ] || [ -L "$VENV" ]; then mv -- "$VENV" "$OLD"; fi
  finish_swap
  say "$(printf '\r')set-up done in $SECONDS s"
}

ensure_venv() {
  choose_accelerator
  if is_ready; then
    if [ -e "$OLD" ]; then rm -rf -- "$OLD"; fi # a set-up was killed after its swap
    return
  fi
  mkdir -p -- "$ROOT/.cache" 2>/dev/null || die "cannot write to $ROOT"
  if command -v flock >/dev/null; then
    exec 9>"$ROOT/.cache/setup.lock"
    flock -n 9 || {
      say "another set-up is under way in $ROOT: waiting for it"
      flock 9
    }
  fi
  finish_swap
  choose_accelerator # what a swap has just brought back may say which
  # Whoever held the lock may have done the work.
  if ! is_ready; then install_everything; fi
  exec 9>&-
}

has_docs() {
  [ -f "$VENV/$DOCS_STAMP" ] && [ "$(cat "$VENV/$DOCS_STAMP")" = "$(sha256 <"$DOCS_REQUIREMENTS")" ]
}

# What builds the site goes into .venv by itself: it changes nothing that the other commands use.
ensure_docs() {
  if has_docs; then return; fi
  mkdir -p -- "$ROOT/.cache" 2>/dev/null || die "cannot write to $ROOT"
  if command -v flock >/dev/null; then
    exec 9>"$ROOT/.cache/setup.lock"
    flock 9
  fi
  if ! has_docs; then
    say "installing what builds the documentation, 7 packages and what they need (log: $LOG)"
    : >"$LOG"
    INTO="$VENV" pip_install "requirements-docs.txt" -c "$REQUIREMENTS" -r "$DOCS_REQUIREMENTS"
    sha256 <"$DOCS_REQUIREMENTS" >"$VENV/$DOCS_STAMP"
  fi
  exec 9>&-
}

# --- commands -------------------------------------------------------------------------------------------------------

enter() {
  ensure_venv
  export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
  if [ "$ACCELERATOR" = cpu ]; then export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"; fi
  # Large buffers in large pages: on a CPU the products with the vocabulary otherwise wait for page faults (a fifth faster).
  case "${GLIBC_TUNABLES:-}" in
    *glibc.malloc.hugetlb*) ;;
    *) export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1" ;;
  esac
}

# Args: experiment, flags. The caller's folder stays the current one, so that relative paths mean what they say; -P keeps it off
# sys.path, where a folder named experiments, or a file named select.py, would shadow ours.
run_experiment() {
  enter
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  local name="$1"
  shift
  exec "$VENV/bin/python" -P -m "experiments.$name" "$@"
}

main() {
  local command="${1:-help}"
  shift || true
  case "$command" in
    help | -h | --help) usage ;;
    setup)
      enter
      say "ready: $VENV (Python $(venv_python "$VENV"), $ACCELERATOR)"
      ;;
    test)
      enter
      cd -- "$ROOT"
      exec "$VENV/bin/python" -m pytest "$@"
      ;;
    lint)
      enter
      cd -- "$ROOT"
      "$VENV/bin/python" -m ruff check "$@" .
      exec "$VENV/bin/python" -m ruff format --check .
      ;;
    docs)
      enter
      ensure_docs
      cd -- "$ROOT"
      "$VENV/bin/python" docs/check_docs.py
      rm -rf -- docs/_build # pages of modules that are gone would stay
      "$VENV/bin/python" -m sphinx -q -E -W --keep-going -j auto -b html docs docs/_build "$@"
      say "ready: open $ROOT/docs/_build/index.html"
      ;;
    *)
      if ! is_experiment "$command"; then
        local near
        near="$(near_command "$command")"
        die "unknown command '$command'; ${near:+did you mean $near? }commands: setup test lint docs help $(experiments | sed 's/ $//')"
      fi
      if [ "$command" = demo ]; then set -- --flagfile="$ROOT/experiments/flags/demo.flags" "$@"; fi
      run_experiment "$command" "$@"
      ;;
  esac
}

main "$@"
