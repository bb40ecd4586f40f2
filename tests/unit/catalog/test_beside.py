"""Writers beside each other, over a few videos that all of them upload, make, delete and let expire."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait

from sqlalchemy import func, select

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.states import LIVE, VideoState
from f2l_vllm.catalog.tables import Upload, adapters, files, jobs, tombstones, usage
from f2l_vllm.catalog.tombstones import VideoGone
from f2l_vllm.store.adapter_info import AdapterInfo
from f2l_vllm.store.errors import CatalogBusy

WRITERS, STEPS = 6, 120  # of each of them
HASHES = [f"{number:064x}" for number in range(5)]
TENANTS = ("alice", "bob")


def enter(catalog, dice):
    sha256, tenant = dice.choice(HASHES), dice.choice(TENANTS)
    video = catalog.reserve_video(sha256)
    upload = Upload(tenant, sha256, 10, "v.mp4", "vision", expires_seconds=dice.choice([0.05, 3600.0]))
    try:
        catalog.add_file(upload, f"f2l-{sha256[-4:]}", queue_limit=100, video=video)
    except VideoGone:
        return "gone"
    if dice.random() < 0.1:  # as an upload that was refused at the last moment
        catalog.give_back_video(catalog.reserve_video(sha256, anew=True))
    return "entered"


def leave(catalog, dice):
    tenant = dice.choice(TENANTS)
    page, _ = catalog.files(tenant, after=None, limit=20, descending=dice.random() < 0.5)
    if not page:
        return "nothing"
    removal = catalog.remove_file(dice.choice(page).id, tenant)
    return "nothing" if removal is None else catalog.bury(removal.doomed) or "left"


def work(catalog, dice):
    for job in catalog.claim_jobs(2):
        catalog.advance(job.adapter_name, VideoState.DECODING, 0.5)
        catalog.advance(job.adapter_name, VideoState.PUBLISHING, 0.5)
        if dice.random() < 0.2:
            catalog.release_job(job.adapter_name)
        else:
            catalog.finish_job(job.adapter_name, rank=4, size=1, info=AdapterInfo())
        return "worked"
    return "idle"


def tidy(catalog, dice):
    catalog.expire_files(time.time(), 5)
    page, _ = catalog.files("alice", after=None, limit=20, descending=True)
    catalog.touch({record.id: time.time() for record in page}, {record.adapter_name: 1.0 for record in page})
    catalog.beat()
    return "tidied"


def test_nothing_is_lost_doubled_or_left(database_url):
    done, heard, ended = Counter(), {}, threading.Event()

    def write(number):
        catalog, dice = Catalog(database_url), random.Random(number)
        catalog.pool = f"pool-{number}"
        catalog.beat()
        for _ in range(STEPS):
            step = dice.choices([enter, leave, work, tidy], [4, 4, 4, 1])[0]
            try:
                done[step(catalog, dice)] += 1
            except CatalogBusy:  # a deadlock would be one
                done["busy"] += 1
        catalog.close()

    def listen():
        """As a server that forgets what was deleted."""
        catalog, seen, more = Catalog(database_url), 0, True
        while more or not ended.is_set():
            more = False
            for deletion in catalog.deletions_after(seen, 50):
                heard[deletion.seq] = deletion
                seen, more = deletion.seq, True
            time.sleep(0.002)
        catalog.close()

    with ThreadPoolExecutor(WRITERS + 1) as threads:
        listening = threads.submit(listen)
        writing = [threads.submit(write, number) for number in range(WRITERS)]
        wait(writing)
        ended.set()
        for end in (*writing, listening):
            end.result()
    assert min(done["entered"], done["left"], done["worked"], done["tidied"]) > 10, done
    assert done["busy"] == 0

    catalog = Catalog(database_url)
    catalog.expire_files(time.time(), 1000)
    with catalog._read() as connection:
        live = connection.execute(select(files).where(files.c.state.in_(LIVE))).all()
        kept = dict(connection.execute(select(usage.c.tenant, usage.c.bytes)).all())
        published = set(connection.scalars(select(adapters.c.name)))
        in_line = list(connection.scalars(select(jobs.c.adapter_name)))
        buried = {(row.name, row.generation) for row in connection.execute(select(tombstones)) if not row.reserved}
        named = select(tombstones.c.seq, tombstones.c.kind, tombstones.c.doomed_at)
        of_adapters = {row.seq for row in connection.execute(named) if row.kind == "adapter"}
        numbers = connection.scalar(select(func.count()).select_from(tombstones))
    assert numbers
    assert {seq for seq in of_adapters if seq < max(heard)} <= heard.keys()  # no deletion was passed by
    assert kept == {tenant: 10 * count for tenant, count in Counter(row.tenant for row in live).items()}
    for row in live:
        assert (row.sha256, row.generation) not in buried
        if row.state == VideoState.PROCESSED:
            assert row.adapter_name in published
        else:
            assert row.adapter_name in in_line
    assert len(in_line) == len(set(in_line))
    assert published <= {row.adapter_name for row in live}
    assert len({(row.sha256, row.generation) for row in live}) == len({row.sha256 for row in live})
    catalog.close()
