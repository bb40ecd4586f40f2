from benchmarks.churn import churn


def test_videos_that_come_and_go_leave_nothing_behind(database_url, tmp_path):
    found = churn(cycles=60, warm_up=20, folder=tmp_path, url=database_url)
    before, after, empty = found["before"], found["after"], found["when_all_are_deleted"]
    same = set(before) - {"rss_bytes", "database_bytes"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert after["rss_bytes"] - before["rss_bytes"] < 8 << 20
    assert {key: empty[key] for key in same - {"open_files"}} == dict.fromkeys(same - {"open_files"}, 0)
