"""MONAI Label's own switch for authentication, against a realm that this test serves in the place of Keycloak."""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests

pytest.importorskip("monailabel")

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from phantom_studies import write_studies
from serving import serving

pytestmark = pytest.mark.slow


@pytest.fixture
def realm():
    """URL of a realm that publishes a key, and the key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    answer = json.dumps({"public_key": base64.b64encode(public).decode()}).encode()

    class Realm(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/realms/test", key
    httpd.shutdown()


def test_the_switch_lets_in_who_has_a_role_and_nobody_else(realm, tmp_path):
    url, key = realm
    environment = {"MONAI_LABEL_AUTH_ENABLE": "true", "MONAI_LABEL_AUTH_REALM_URI": url}
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def token(signer, *roles: str, age: int = 0) -> dict[str, str]:
        claims = {"preferred_username": "anna", "email": "a@b", "name": "Anna", "realm_access": {"roles": list(roles)}}
        signed = jwt.encode({**claims, "exp": int(time.time()) + 600 - age}, signer, algorithm="RS256")
        return {"Authorization": f"Bearer {signed}"}

    studies = write_studies(tmp_path / "studies")
    with serving(studies, tmp_path, environment=environment) as server:
        info = f"{server.url}/info/"
        assert requests.get(info).status_code == 401
        assert requests.post(f"{server.url}/infer/points?image=photo", data={"params": "{}"}).status_code == 401
        assert requests.get(info, headers=token(stranger, "monailabel-user")).status_code == 401
        assert requests.get(info, headers=token(key, "monailabel-user", age=1200)).status_code == 401
        assert requests.get(info, headers=token(key, "someone")).status_code == 403
        user = token(key, "monailabel-user")
        assert requests.get(info, headers=user).status_code == 200
        assert requests.delete(f"{server.url}/datastore/image?id=photo", headers=user).status_code == 403
