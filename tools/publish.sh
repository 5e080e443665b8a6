#!/usr/bin/env bash
# Publish a site on the branch gh-pages of a remote: at its root, or as an edition under a folder of its own (v1.2.0).
# What stands at the root is replaced; editions that were published before stay.
#
#     tools/publish.sh SITE REMOTE MESSAGE [EDITION]
set -euo pipefail
site="$(cd "$1" && pwd)" remote="$2" message="$3" edition="${4:-}"
if [[ -n "$edition" && ! "$edition" =~ ^v[0-9]+(\.[0-9]+)*$ ]]; then
    echo "publish.sh: an edition is named like v1.2.0, not '$edition'" >&2
    exit 2
fi

branch="$(mktemp -d)"
trap 'rm -rf "$branch"' EXIT
if ! git clone --quiet --depth 1 --branch gh-pages "$remote" "$branch" 2> /dev/null; then
    git -C "$branch" init --quiet --initial-branch=gh-pages
    git -C "$branch" remote add origin "$remote"
fi
cd "$branch"
if [[ -n "$edition" ]]; then
    rm -rf "$edition"
    mkdir "$edition"
    cp -r "$site/." "$edition/"
else
    find . -mindepth 1 -maxdepth 1 ! -name .git ! -name 'v[0-9]*' -exec rm -rf {} +
    cp -r "$site/." .
fi
touch .nojekyll

# one commit without history: notebooks and pages are large, and are made from the sources
git checkout --quiet --orphan next
git add --all
git -c user.name=publish -c user.email=publish@users.noreply.github.com commit --quiet --message "$message"
git push --quiet --force origin next:gh-pages
