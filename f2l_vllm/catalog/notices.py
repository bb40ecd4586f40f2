"""What PostgreSQL tells whoever listens: that a job waits, a file's work has ended, something was deleted, or other
models were appointed.

Triggers send a notice with the commit of the change, whoever makes it, at the cost of no round trip. It says only that
there is something to look at, so one is enough for many rows of a transaction. SQLite sends none.

Transactions that send notices commit one after the other, and each notice wakes every listener. So uploads, which come
in hundreds a second, do not each send one: whoever hears of a job looks for more for a while.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from f2l_vllm.catalog.states import IN_WORK, VideoState

CHANNEL = "f2l"
JOBS = "jobs"  # a job was entered, or waits again
FILES = "files"  # a file is no longer in work, or gone
DELETIONS = "deletions"  # something has to be forgotten
MODELS = "models"  # a revision was appointed
JOBS_SECONDS = 0.25  # for so long after a notice no other one tells of jobs

_ENDED = ", ".join(f"'{state}'" for state in VideoState if state not in IN_WORK)
# A sequence can be set and read beside other transactions; here it holds the time of the last notice in milliseconds.
_FUNCTIONS = f"""
CREATE SEQUENCE IF NOT EXISTS f2l_jobs_told;
CREATE OR REPLACE FUNCTION f2l_tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('{CHANNEL}', TG_ARGV[0]);
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION f2l_tell_of_job() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    this_moment bigint := extract(epoch FROM clock_timestamp()) * 1000;
BEGIN
    IF this_moment - (SELECT last_value FROM f2l_jobs_told) NOT BETWEEN 0 AND {JOBS_SECONDS * 1000:.0f} THEN
        PERFORM setval('f2l_jobs_told', this_moment);
        PERFORM pg_notify('{CHANNEL}', '{JOBS}');
    END IF;
    RETURN NULL;
END $$
"""
_OF_JOB, _OF_FILE, _OF_DELETION = "f2l_tell_of_job()", f"f2l_tell('{FILES}')", f"f2l_tell('{DELETIONS}')"
_OF_MODELS = f"f2l_tell('{MODELS}')"
# By name: table, event, condition, and who tells of it. A trigger that is new or changes gets another name, and a step
# in `migrations/versions`, which may do nothing itself: triggers are looked at after a step.
_TRIGGERS = {
    "f2l_job_entered": ("jobs", "INSERT", "NEW.running = 0", _OF_JOB),
    "f2l_job_released": ("jobs", "UPDATE OF running", "OLD.running <> 0 AND NEW.running = 0", _OF_JOB),
    "f2l_file_ended": ("files", "UPDATE OF state", f"OLD.state <> NEW.state AND NEW.state IN ({_ENDED})", _OF_FILE),
    "f2l_tombstone_entered": ("tombstones", "INSERT", "NOT NEW.reserved", _OF_DELETION),
    "f2l_tombstone_opened": ("tombstones", "UPDATE OF reserved", "OLD.reserved AND NOT NEW.reserved", _OF_DELETION),
    "f2l_revision_appointed": ("serving", "INSERT", "true", _OF_MODELS),
}
_TABLES = ", ".join(f"'{table}'::regclass" for table in sorted({trigger[0] for trigger in _TRIGGERS.values()}))
_KNOWN = f"SELECT tgname FROM pg_trigger WHERE tgrelid IN ({_TABLES})"


def create_triggers(connection: Connection) -> None:
    """Create missing triggers, on PostgreSQL. The caller excludes all other writers."""
    if connection.dialect.name != "postgresql":
        return
    known = set(connection.scalars(text(_KNOWN)))
    missing = {name: trigger for name, trigger in _TRIGGERS.items() if name not in known}
    if missing:
        connection.exec_driver_sql(_FUNCTIONS)
    for name, (table, change, condition, function) in missing.items():
        connection.exec_driver_sql(
            f"CREATE TRIGGER {name} AFTER {change} ON {table} FOR EACH ROW "
            f"WHEN ({condition}) EXECUTE FUNCTION {function}"
        )
