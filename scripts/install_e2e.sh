#!/bin/sh
# Install what the end-to-end tests drive: Orthanc with its DICOMweb plugin, Chromium, and playwright-core for Node.js.
#
#     sh scripts/install_e2e.sh            all of it
#     sh scripts/install_e2e.sh orthanc    Orthanc alone, for make ohif
#
# Debian and Ubuntu, as root. Where it may not install something (no root, no network, another system) it says so and ends
# with 0: those tests are then reported as skipped. What is there already is left alone, so a second run takes no time.

cd "$(dirname "$0")/.." || exit 0

say() { echo "install_e2e: $*"; }

packages=""
{ command -v Orthanc || [ -x /usr/sbin/Orthanc ]; } >/dev/null 2>&1 || packages="orthanc"
[ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || packages="$packages orthanc-dicomweb"
if [ "$1" != orthanc ]; then
    { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 || packages="$packages chromium"
    command -v node >/dev/null 2>&1 || packages="$packages nodejs"
    command -v npm >/dev/null 2>&1 || packages="$packages npm"
fi

if [ -n "$packages" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        say "no apt-get here: install$packages yourself, or what needs them cannot run"
    elif [ "$(id -u)" != 0 ]; then
        say "not root: run 'sudo sh scripts/install_e2e.sh' for$packages, or what needs them cannot run"
    else
        options="-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o DPkg::Lock::Timeout=60"
        export DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC2086
        { timeout 120 apt-get $options update && timeout 600 apt-get $options install -y --no-install-recommends $packages; } \
            >/dev/null 2>&1 || say "apt-get could not install$packages: what needs them cannot run"
    fi
fi

if [ "$1" != orthanc ] && command -v npm >/dev/null 2>&1 && [ ! -d tests/browser/node_modules/playwright-core ]; then
    timeout 120 npm ci --prefix tests/browser --no-audit --no-fund --ignore-scripts --fetch-retries=1 --fetch-timeout=15000 \
        >/dev/null 2>&1 || say "npm could not install playwright-core: the tests with a browser are skipped"
fi
exit 0
