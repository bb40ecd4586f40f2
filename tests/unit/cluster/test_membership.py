from f2l_vllm.cluster import membership
from f2l_vllm.cluster.membership import Affinity, Membership

URLS = {"b": "http://b", "a": "http://a"}


def engines() -> Membership:
    known = Membership()
    known.update(URLS)
    return known


def test_a_load_is_what_was_sent_and_what_others_have_there(monkeypatch):
    known, now = engines(), 100.0
    monkeypatch.setattr(membership.time, "monotonic", lambda: now)
    known.begin("a")
    known.heard("a", 5)  # one of them is ours
    known.begin("a")
    assert list(known.loads().items()) == [("a", 6), ("b", 0)]
    known.end("a")
    known.end("a")
    assert known.loads()["a"] == 4
    now += 2.5  # too long ago to be relied on
    assert known.loads()["a"] == 0


def test_an_engine_that_failed_is_asked_last_until_it_answers_or_some_seconds_have_passed(monkeypatch):
    known, now = engines(), 100.0
    monkeypatch.setattr(membership.time, "monotonic", lambda: now)
    known.suspect("a")
    assert list(known.loads()) == ["b"]
    assert list(known.loads(tried=["b"])) == ["b"]  # rather than one that is known to be away
    known.heard("a", 0)
    assert list(known.loads()) == ["a", "b"]
    known.suspect("a")
    known.suspect("b")
    assert list(known.loads()) == ["a", "b"]
    now += 6
    known.suspect("b")
    assert list(known.loads()) == ["a"]


def test_an_engine_that_comes_back_elsewhere_begins_anew():
    known = engines()
    known.begin("a")
    known.suspect("a")
    known.update({**URLS, "a": "http://elsewhere"})
    assert known.urls()["a"] == "http://elsewhere"
    assert known.loads() == {"a": 0, "b": 0}
    known.update({"b": "http://b"})
    for change in (known.begin, known.end, known.suspect):
        change("a")  # the relay may hear later than the router
    assert known.loads() == {"b": 0}


def test_requests_about_no_video_go_to_whoever_has_least_to_do():
    known = engines()
    affinity = Affinity(known, places=4, concurrency=4)
    known.begin("a")
    assert affinity.choose("", ()) == "b"
    assert affinity.choose("", ("b",)) == "a"
    known.update({})
    assert affinity.choose("", ()) is None
    assert affinity.choose("video", ()) is None
