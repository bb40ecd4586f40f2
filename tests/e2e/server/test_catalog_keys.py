"""A real server whose keys are the catalog's."""

import time

import openai
import pytest

from f2l_vllm.catalog.keys import key_hash
from tests.e2e.server.conftest import keys_of


def test_a_key_works_once_it_is_added_and_no_more_when_it_is_revoked(other_server, clips):
    keys = keys_of(other_server.home)
    file_id = other_server.upload(clips[0]).id
    first, other = keys("add", "news"), keys("add", "sport", "--label", "laptop")
    first, other = (other_server.client.with_options(api_key=key) for key in (first, other))
    time.sleep(1.0)
    assert first.files.retrieve(file_id).id == file_id
    assert [model.id for model in other.models.list()] == ["base"]
    with pytest.raises(openai.NotFoundError):
        other.files.retrieve(file_id)
    keys("revoke", "laptop")
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    second = other_server.client.with_options(api_key=keys("add", "news"))
    keys("revoke", key_hash(first.api_key)[:8])
    with pytest.raises(openai.AuthenticationError):
        first.files.retrieve(file_id)
    time.sleep(1.0)
    assert second.files.retrieve(file_id).id == file_id
    other_server.client.files.delete(file_id)
