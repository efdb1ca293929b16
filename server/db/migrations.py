"""Database migrations, numbered. A released one is never changed."""

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

migrations = Migrations("plantain")


@migrations(name="0001_first")
def first(db: Database) -> None:
    """Users and keys have Better Auth's table and column names, so that its databases can be imported."""
    for statement in FIRST.split(";"):
        if statement.strip():
            db.execute(statement)


FIRST = """
CREATE TABLE user (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    email TEXT NOT NULL UNIQUE,
    emailVerified INTEGER NOT NULL DEFAULT 0,
    image TEXT,
    createdAt TEXT NOT NULL,
    updatedAt TEXT NOT NULL,
    role TEXT NOT NULL DEFAULT 'user',
    plan TEXT NOT NULL DEFAULT 'free',
    balance INTEGER NOT NULL DEFAULT 0 CHECK (balance >= 0)
);
CREATE TABLE apikey (
    id TEXT PRIMARY KEY,
    name TEXT,
    start TEXT NOT NULL,
    prefix TEXT NOT NULL,
    key TEXT NOT NULL UNIQUE,
    referenceId TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    enabled INTEGER NOT NULL DEFAULT 1,
    lastRequest TEXT,
    expiresAt TEXT,
    createdAt TEXT NOT NULL,
    updatedAt TEXT NOT NULL
);
CREATE INDEX apikey_by_user ON apikey(referenceId);
CREATE TABLE job (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL REFERENCES user(id),
    key_id TEXT,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    workflow TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    params TEXT NOT NULL,
    pixels INTEGER NOT NULL,
    output_name TEXT NOT NULL UNIQUE,
    credits INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    device TEXT,
    served_by TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    output TEXT,
    error TEXT
);
CREATE INDEX job_by_user ON job(user_id, seq);
CREATE INDEX job_unfinished ON job(seq) WHERE status IN ('queued', 'running');
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES user(id),
    kind TEXT NOT NULL CHECK (kind IN ('grant', 'charge', 'refund')),
    amount INTEGER NOT NULL,
    balance INTEGER NOT NULL,
    job_id TEXT,
    note TEXT,
    created_at REAL NOT NULL,
    UNIQUE (job_id, kind)
);
CREATE INDEX ledger_by_user ON ledger(user_id, id);
CREATE TABLE file (
    name TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES user(id),
    job_id TEXT,
    origin TEXT NOT NULL CHECK (origin IN ('input', 'output', 'upload')),
    created_at REAL NOT NULL
)
"""


@migrations(name="0002_auth")
def auth(db: Database) -> None:
    """Better Auth's other tables. Two columns are our own: `session.sealed` (see `server/auth/sessions.py`), and
    `user.deletedAt`, since the ledger and the jobs of a deleted user stay."""
    for statement in AUTH.split(";"):
        if statement.strip():
            db.execute(statement)


AUTH = """
ALTER TABLE user ADD COLUMN banned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE user ADD COLUMN banReason TEXT;
ALTER TABLE user ADD COLUMN banExpires TEXT;
ALTER TABLE user ADD COLUMN deletedAt TEXT;
CREATE TABLE session (
    id TEXT PRIMARY KEY,
    expiresAt TEXT NOT NULL,
    token TEXT NOT NULL UNIQUE,
    sealed TEXT NOT NULL,
    createdAt TEXT NOT NULL,
    updatedAt TEXT NOT NULL,
    ipAddress TEXT,
    userAgent TEXT,
    userId TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    impersonatedBy TEXT
);
CREATE INDEX session_by_user ON session(userId);
CREATE TABLE account (
    id TEXT PRIMARY KEY,
    accountId TEXT NOT NULL,
    providerId TEXT NOT NULL,
    userId TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    accessToken TEXT,
    refreshToken TEXT,
    idToken TEXT,
    accessTokenExpiresAt TEXT,
    refreshTokenExpiresAt TEXT,
    scope TEXT,
    password TEXT,
    createdAt TEXT NOT NULL,
    updatedAt TEXT NOT NULL,
    UNIQUE (userId, providerId)
);
CREATE TABLE verification (
    id TEXT PRIMARY KEY,
    identifier TEXT NOT NULL,
    value TEXT NOT NULL,
    expiresAt TEXT NOT NULL,
    createdAt TEXT NOT NULL,
    updatedAt TEXT NOT NULL
);
CREATE INDEX verification_by_identifier ON verification(identifier);
ALTER TABLE apikey ADD COLUMN configId TEXT NOT NULL DEFAULT 'default';
ALTER TABLE apikey ADD COLUMN refillInterval INTEGER;
ALTER TABLE apikey ADD COLUMN refillAmount INTEGER;
ALTER TABLE apikey ADD COLUMN lastRefillAt TEXT;
ALTER TABLE apikey ADD COLUMN rateLimitEnabled INTEGER NOT NULL DEFAULT 0;
ALTER TABLE apikey ADD COLUMN rateLimitTimeWindow INTEGER;
ALTER TABLE apikey ADD COLUMN rateLimitMax INTEGER;
ALTER TABLE apikey ADD COLUMN requestCount INTEGER NOT NULL DEFAULT 0;
ALTER TABLE apikey ADD COLUMN remaining INTEGER;
ALTER TABLE apikey ADD COLUMN permissions TEXT;
ALTER TABLE apikey ADD COLUMN metadata TEXT
"""


@migrations(name="0003_limits")
def limits(db: Database) -> None:
    """Calls for the rate limits, idempotency keys, and the audit log. The ledger and the log become append-only."""
    for statement in LIMITS.split(";"):
        if statement.strip():
            db.execute(statement)
    for table, act in (("audit", "UPDATE"), ("audit", "DELETE"), ("ledger", "UPDATE"), ("ledger", "DELETE")):
        db.execute(
            f"CREATE TRIGGER {table}_without_{act} BEFORE {act} ON {table}"
            f" BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )


LIMITS = """
CREATE TABLE call (
    user_id TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    key_id TEXT,
    called_at REAL NOT NULL
);
CREATE INDEX call_by_user ON call(user_id, called_at);
CREATE INDEX call_by_key ON call(key_id, called_at);
CREATE TABLE idempotency (
    user_id TEXT NOT NULL REFERENCES user(id) ON DELETE CASCADE,
    route TEXT NOT NULL,
    key TEXT NOT NULL,
    body_hash TEXT NOT NULL,
    job_id TEXT NOT NULL,
    ignored TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (user_id, route, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_by_age ON idempotency(created_at);
CREATE TABLE audit (
    id INTEGER PRIMARY KEY,
    actor_id TEXT,
    actor_key_id TEXT,
    act TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE INDEX job_unfinished_by_user ON job(user_id) WHERE status IN ('queued', 'running');
CREATE INDEX job_by_day ON job(created_at)
"""


@migrations(name="0004_remote")
def remote(db: Database) -> None:
    """The endpoint and the request id of a job at fal."""
    db.execute("ALTER TABLE job ADD COLUMN remote_endpoint TEXT")
    db.execute("ALTER TABLE job ADD COLUMN remote_request_id TEXT")


@migrations(name="0006_memory")
def memory(db: Database) -> None:
    """Measured memory peaks, attempts that ran out of memory (`rung`), and the last snapshot of each device."""
    for statement in MEMORY.split(";"):
        if statement.strip():
            db.execute(statement)


MEMORY = """
CREATE TABLE peak (
    model TEXT NOT NULL,
    tier TEXT NOT NULL,
    tiled INTEGER NOT NULL,
    phase TEXT NOT NULL,
    pixels INTEGER NOT NULL,
    frames INTEGER NOT NULL,
    device_kind TEXT NOT NULL,
    working_bytes INTEGER NOT NULL,
    allocated_bytes INTEGER NOT NULL,
    measured_at REAL NOT NULL,
    PRIMARY KEY (model, tier, tiled, phase, pixels, frames, device_kind)
) WITHOUT ROWID;
CREATE TABLE rung (
    id INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL,
    model TEXT NOT NULL,
    device TEXT NOT NULL,
    way TEXT NOT NULL,
    next_device TEXT,
    next_way TEXT,
    failed_at REAL NOT NULL
);
CREATE INDEX rung_by_job ON rung(job_id);
CREATE TABLE device (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    seen_at REAL NOT NULL
) WITHOUT ROWID
"""


@migrations(name="0007_last_rung")
def last_rung(db: Database) -> None:
    """How a job may run at fal if it runs out of memory here (`overflow`); the budget of an attempt that ran out."""
    db.execute("ALTER TABLE job ADD COLUMN overflow TEXT")
    db.execute("ALTER TABLE rung ADD COLUMN budget_bytes INTEGER")


@migrations(name="0005_queue")
def queue(db: Database) -> None:
    """Priority, weight and predicted start of jobs; learned durations (`timing`); paused queue and devices (`halt`)."""
    for statement in QUEUE.split(";"):
        if statement.strip():
            db.execute(statement)


QUEUE = """
ALTER TABLE job ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN weight REAL NOT NULL DEFAULT 1;
ALTER TABLE job ADD COLUMN promised_start_at REAL;
CREATE TABLE timing (
    model TEXT NOT NULL,
    workflow TEXT NOT NULL,
    work INTEGER NOT NULL,
    run_s REAL NOT NULL,
    runs INTEGER NOT NULL,
    PRIMARY KEY (model, workflow, work)
) WITHOUT ROWID;
CREATE TABLE halt (
    what TEXT PRIMARY KEY,
    since_at REAL NOT NULL
) WITHOUT ROWID
"""


@migrations(name="0008_weights")
def weights(db: Database) -> None:
    """Whether a job was planned with installed weights or with demo weights."""
    db.execute("ALTER TABLE job ADD COLUMN weights TEXT")
