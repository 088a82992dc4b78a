#!/usr/bin/env bash
# Tests on an ARM processor that is emulated: bash tests/on_arm.sh [pytest's arguments]
#
# As root on Debian or Ubuntu, once: apt-get install debootstrap qemu-user-static, which registers itself with the
# kernel (binfmt_misc). A Debian for ARM is made in ARM_ROOT, with this checkout as it is and what the tests need: 8 GB,
# 20 minutes. Tests take many times as long as here.
#
# QEMU_CPU=neoverse-n1 is a processor without bfloat16. QEMU's own default has vectors of 2,048 bits, which no processor
# has, and with which torch's float32 products are wrong.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${ARM_ROOT:-/var/tmp/saevlm-fast-arm64}
processor=${QEMU_CPU:-max,sve256=on}

if [ ! -e "$root/whole" ]; then
    debootstrap --arch=arm64 --variant=minbase --include=python3,python3-venv,git,ca-certificates,libgomp1 \
        bookworm "$root" http://deb.debian.org/debian
    touch "$root/whole"
fi
cp /etc/resolv.conf "$root/etc/"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
mkdir -p "$root/checkout"
find "$root/checkout/" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
git ls-files -z | xargs -0 tar -c | tar -x -C "$root/checkout"

mounted() { grep -q " $root/$1 " /proc/mounts; }
mounted proc || mount -t proc proc "$root/proc"
mounted dev || mount --bind /dev "$root/dev"
trap 'umount "$root/proc" "$root/dev"' EXIT # else who deletes the root deletes the devices of this machine
for core in 0 1; do # oneDNN ends the process where Linux does not name the processor
    identity="$root/sys/devices/system/cpu/cpu$core/regs/identification"
    mkdir -p "$identity"
    echo 0x00000000410fd400 >"$identity/midr_el1"
done
echo 0-1 | tee "$root"/sys/devices/system/cpu/{online,possible,present} >/dev/null

env -i PATH=/usr/sbin:/usr/bin:/bin HOME=/root LANG=C.UTF-8 OMP_NUM_THREADS=1 QEMU_CPU="$processor" \
    chroot "$root" bash -euc '
cd /checkout
python="$PWD/.venv/bin/python"
if [ ! .venv/installed -nt pyproject.toml ]; then
    python3 -m venv .venv
    "$python" -m pip install -q -e ".[test]"
    touch .venv/installed
fi
"$python" -m pytest -q -p no:cacheprovider "$@"' on_arm "$@"
