#!/usr/bin/env bash
# tests/arm/chroot.sh DIR [PYTEST ARGUMENT...]
#
# Builds the whole package for aarch64 and runs its operator tests, on a Debian machine of another
# architecture: a chroot of Debian arm64 in DIR, every program in it in QEMU. Needs root and the packages
# debootstrap and qemu-user-static. The chroot (2.5 GB) is made once, in about four minutes, and kept; the
# package is built anew each time, because that is what is tested. To start over, delete DIR.
#
# Not part of CI, which only runs the kernels in QEMU (tests/test_kernels.py): emulated, the tests take
# minutes, and torch.compile has no compiler fast enough.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
root=$(cd "$1" && pwd)
shift
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(tests/test_ops.py tests/test_isa.py tests/test_linear.py tests/test_packing.py)
cd "$(dirname "$0")/../.."

# The Python of Debian 12, and the oldest torch that the package supports. Its aarch64 wheel on PyPI is for
# CPUs (146 MB); that of 2.13 wants CUDA.
debian=bookworm
python=3.11
torch=2.10.0

for program in debootstrap qemu-aarch64-static; do
  command -v $program > /dev/null || { echo "no $program: apt-get install debootstrap qemu-user-static"; exit 1; }
done

# The system starts aarch64 programs in QEMU, also inside the chroot (flag F keeps the emulator open).
binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
[ -e $binfmt/qemu-aarch64 ] || grep '^:' /usr/lib/binfmt.d/qemu-aarch64.conf > $binfmt/register

if [ ! -e "$root/.complete" ]; then
  debootstrap --arch=arm64 --variant=minbase --include=g++,python3-dev,python3-pip $debian "$root"
  # pip runs outside, where it is not emulated. It takes the conditions of dependencies from the machine that
  # it runs on (CUDA for x86-64), hence the list.
  python3 -m pip install --target "$root/opt/site" --no-deps --only-binary=:all: --implementation cp \
    --python-version $python --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    torch==$torch filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions \
    click safetensors tokenizers tqdm \
    attrs hypothesis iniconfig numpy packaging pluggy pygments pytest sortedcontainers \
    ninja setuptools wheel
  touch "$root/.complete"
fi

rm -rf "$root/src"
mkdir "$root/src"
git ls-files -z | xargs -0 cp --parents -t "$root/src"

# The best CPU that QEMU can be, so that every NEON table runs.
chroot "$root" /usr/bin/env -i PATH=/opt/site/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root PYTHONPATH=/opt/site QEMU_CPU=max \
  sh -euc '
    cd /src
    python3 -m pip install --no-build-isolation --no-deps --no-index --break-system-packages .
    rm -rf bitnet_ops build  # what is tested is the installed package
    python3 -c "import bitnet_ops, torch; print(torch.__version__, bitnet_ops.isa(), bitnet_ops.supported_isas())"
    exec python3 -m pytest -p no:cacheprovider "$@"
  ' sh "${tests[@]}"
