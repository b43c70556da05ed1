"""The tables of the server's database. Their history is in `migrations`; times are seconds since 1970."""

import sqlalchemy as sa

metadata = sa.MetaData()

ID, TIME = sa.String(64), sa.Double


def _id() -> sa.Column[str]:
    return sa.Column("id", ID, primary_key=True)


def _owner() -> sa.Column[str]:
    return sa.Column("owner", ID, nullable=False)


def _time(name: str, required: bool = True) -> sa.Column[float]:
    return sa.Column(name, TIME, nullable=not required)


keys = sa.Table(
    "keys",
    metadata,
    _id(),
    sa.Column("hash", sa.String(64), nullable=False),  # SHA-256 of a random secret of 256 bits
    sa.Column("name", sa.String(200), nullable=False),
    _time("created"),
    _time("revoked", False),
)

uploads = sa.Table(
    "uploads",
    metadata,
    _id(),
    _owner(),
    sa.Column("kind", sa.String(16), nullable=False),  # "photo", or "persona" for a persona's file
    sa.Column("sha256", sa.String(64), nullable=False),  # of what the client sent
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    _time("created"),
    _time("expires"),
    sa.Index("uploads_expires", "expires"),
)

personas = sa.Table(
    "personas",
    metadata,
    _id(),
    _owner(),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("encoder", sa.String(200), nullable=False),
    sa.Column("photos", sa.Integer, nullable=False),
    sa.Column("consent", sa.String(32), nullable=True),
    sa.Column("faces", sa.Text, nullable=False),  # JSON: what was understood from each photo
    _time("created"),
    _time("expires"),
    sa.Index("personas_owner", "owner", "created"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    _id(),
    _owner(),
    sa.Column("kind", sa.String(16), nullable=False),  # "pictures", "persona" or "photo"
    sa.Column("request", sa.Text, nullable=False),  # JSON
    sa.Column("request_hash", sa.String(64), nullable=False),
    sa.Column("idempotency_key", sa.String(200), nullable=True),
    sa.Column("seeds", sa.Text, nullable=False),  # JSON: one per picture, drawn when the job is accepted
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),  # how often it was claimed
    sa.Column("losses", sa.Integer, nullable=False),  # how often its worker was lost
    sa.Column("worker", ID, nullable=True),
    _time("lease_until", False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("stage", sa.String(64), nullable=True),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("result", sa.Text, nullable=True),  # JSON
    sa.Column("error_code", sa.String(64), nullable=True),
    sa.Column("error", sa.Text, nullable=True),
    _time("created"),
    _time("started", False),
    _time("finished", False),
    _time("deadline"),
    _time("expires"),
    sa.UniqueConstraint("owner", "idempotency_key", name="jobs_idempotency"),
    sa.Index("jobs_state", "state", "created"),
    sa.Index("jobs_owner", "owner", "created"),
)

pictures = sa.Table(
    "pictures",
    metadata,
    _id(),
    _owner(),
    sa.Column("job", ID, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("media", sa.String(32), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),  # JSON
    _time("created"),
    _time("expires"),
    sa.UniqueConstraint("job", "number", name="pictures_number"),
    sa.Index("pictures_expires", "expires"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("job", ID, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("body", sa.Text, nullable=False),  # JSON
    _time("at"),
    sa.Index("events_job", "job", "id"),
    sqlite_autoincrement=True,  # an id is never used again, so a client that returns misses nothing
)

workers = sa.Table(
    "workers",
    metadata,
    _id(),
    _time("started"),
    _time("beat"),
    sa.Column("facts", sa.Text, nullable=False),  # JSON: device, model, sizes
    sa.Column("counts", sa.Text, nullable=False),  # JSON: for /metrics
)

buckets = sa.Table(
    "buckets",
    metadata,
    sa.Column("owner", ID, primary_key=True),
    sa.Column("tokens", sa.Double, nullable=False),
    _time("at"),
)
