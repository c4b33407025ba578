# Makes .venv in the project's root, or reuses it, and puts it first on PATH. Source it from bash:
#   source jobs/setup.sh        what training, sampling and evaluation need
#   source jobs/setup.sh dev    also the tools of tests/run.sh
#   source jobs/setup.sh oldest the same in .venv-oldest, with the oldest torch that requirements.txt admits
# The first time takes about 2 minutes; after that nothing runs until requirements.txt or pyproject.toml change.

# A subshell, so that nothing but its exit status reaches the caller.
setup_venv() (
    fail() {
        echo "setup: $1" >&2
        exit 2
    }
    set -o pipefail
    cd "$1" || exit 2
    # A sourced script without arguments sees its caller's, so anything else than dev and oldest is no error.
    target=run venv=.venv
    [ "$2" = dev ] && target=dev
    [ "$2" = oldest ] && target=oldest venv=.venv-oldest

    # The root's path is part of the stamp, because a virtual environment that was moved still points to its old place.
    hash=$( (pwd && cat requirements.txt pyproject.toml) | sha256sum) || fail "cannot read requirements.txt in $PWD"
    hash=${hash%% *}
    stamp=$venv/installed
    up_to_date() {
        [ -x $venv/bin/python ] && [ -f "$stamp" ] || return 1
        [ "$(cat "$stamp")" = "$hash dev" ] || [ "$(cat "$stamp")" = "$hash $target" ]
    }
    up_to_date && exit 0

    # One installation at a time: the second script waits here and then finds the work done. The lock is on this file,
    # which needs no cleaning up.
    exec 9<>jobs/setup.sh || fail "cannot write to $PWD, and $venv is made there"
    flock --nonblock 9 || { echo "setup: waiting for another script to finish setting up $venv" >&2 && flock 9; }
    up_to_date && exit 0

    is_new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
    usable() { # pip says where it lies: in a copied or moved environment it would change the original
        $venv/bin/python -c "$is_new_enough" && $venv/bin/pip --version | grep -qF "$PWD/$venv/"
    }
    if ! usable 2>/dev/null; then
        for python in python3.11 python3.12 python3.13 python3.14 python3 python ""; do
            [ -n "$python" ] || fail "no Python 3.11 or newer on PATH; install one, for example python3.11"
            "$python" -c "$is_new_enough" 2>/dev/null && break
        done
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python cannot make virtual environments; install its venv module (Debian, Ubuntu: python3-venv)"
        echo "setup: setting up $venv with $("$python" --version) (about 2 minutes and 6 GB the first time)" >&2
        "$python" -m venv --clear $venv || fail "$python -m venv $venv failed, see above"
    else
        echo "setup: bringing $venv up to date with requirements.txt" >&2
    fi

    rm -f "$stamp"
    packages=(-r requirements.txt)
    [ "$target" != run ] && packages+=(-e ".[dev]")
    # torch>=2.11,<2.15 becomes torch==2.11.*, and torchvision likewise
    [ "$target" = oldest ] && packages+=($(sed -nE 's/^(torch|torchvision)>=([0-9.]+),.*/\1==\2.*/p' requirements.txt))
    $venv/bin/python -m pip install -qq --no-input --disable-pip-version-check "${packages[@]}" ||
        fail "pip install ${packages[*]} failed, see above; the same command again goes on from there"
    echo "$hash $target" >"$stamp"
)

venv_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
setup_venv "$venv_root" "${1:-}" || exit 2
venv_path=$venv_root/.venv
[ "${1:-}" = oldest ] && venv_path+=-oldest
export VIRTUAL_ENV="$venv_path" PATH="$venv_path/bin:$PATH"
unset -f setup_venv
unset venv_root venv_path
