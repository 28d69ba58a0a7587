"""What the files for a server that others reach say; they are run where Docker is."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NGINX = re.sub(r"#.*", "", (ROOT / "deploy" / "nginx.conf").read_text())
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_redirects_keep_to_the_address_of_the_proxy():
    (location,) = re.findall(r"location / \{(.*?)\}", NGINX, re.DOTALL)
    assert "proxy_redirect http:// https://;" in location and "proxy_set_header Host $http_host;" in location
    assert "absolute_redirect off;" in NGINX


def test_only_the_proxy_has_a_port_and_it_asks_who_one_is():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["nginx"]
    assert "auth_basic_user_file" in NGINX and "auth_basic off" not in NGINX
    assert f"client_max_body_size {SERVICES['zeroseg']['environment']['ZEROSEG_MAX_UPLOAD_MB']}m;" in NGINX
