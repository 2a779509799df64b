#!/usr/bin/env bash
# arm64_python.sh FOLDER: unpacks an aarch64 Python, its headers and the libraries that NumPy needs from Debian's arm64
# packages into FOLDER. Does not change the packages of the machine. Run the Python with qemu-aarch64 and
# QEMU_LD_PREFIX=FOLDER.
set -euo pipefail
folder=$1
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
chmod 755 "$apt"
mkdir -p "$folder" "$apt/lists/partial" "$apt/archives/partial"
touch "$apt/status"
options=(
  -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64
  -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt" -o APT::Sandbox::User=
)
apt-get "${options[@]}" update
apt-get "${options[@]}" -y --download-only --no-install-recommends install python3 libpython3-dev libstdc++6
for package in "$apt"/archives/*.deb; do dpkg -x "$package" "$folder"; done
