"""A real server whose keys are the catalog's."""

import time

import openai
import pytest
from typer.testing import CliRunner

from f2l_vllm.catalog.keys import key_hash
from f2l_vllm.cli.main import app
from tests.support.server import Server


def test_a_key_works_once_it_is_added_and_no_more_when_it_is_revoked(hypernetwork_model, tmp_path, clips):
    def keys(*words):
        found = CliRunner().invoke(app, ["keys", *words, "--home", str(tmp_path)])
        assert found.exit_code == 0, found.output
        return found.stdout.strip()

    first = keys("add", "news")
    server = Server(hypernetwork_model, tmp_path, "--tenants", "catalog", api_key=first)
    try:
        server.wait_ready()
        file_id = server.upload(clips[0]).id
        other = server.client.with_options(api_key=keys("add", "sport", "--label", "laptop"))
        time.sleep(1.0)
        assert [model.id for model in other.models.list()] == ["base"]
        with pytest.raises(openai.NotFoundError):
            other.files.retrieve(file_id)
        keys("revoke", "laptop")
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        second = server.client.with_options(api_key=keys("add", "news"))
        keys("revoke", key_hash(first)[:8])
        with pytest.raises(openai.AuthenticationError):
            server.client.files.retrieve(file_id)
        time.sleep(1.0)
        assert second.files.retrieve(file_id).id == file_id
    finally:
        server.stop()
