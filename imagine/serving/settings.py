"""What an operator chooses: addresses, limits, and how long things are kept."""

import ipaddress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

DAY = 86_400.0


class MarkSettings(BaseModel):
    """Which marks pictures get (`imagine.provenance.marks.Marks`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: bool = True
    prompt: bool = True
    credentials: bool = True
    watermark: bool | None = None  # None: only where it is reliable


class BaseSettings(BaseModel):
    """A public base to draw with instead of imagine's own weights; the fields are those of `imagine.open_base`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # a folder, a hub id, or a short name such as sdxl
    ip_adapter: str | None = None
    image_encoder: str | None = None
    adapter: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    preset: str | None = None
    dtype: str = "auto"
    offload: str = "none"
    quantise: str = "none"
    tiling: bool = False
    revision: str | None = None


class ServeSettings(BaseModel):
    """All settings of a server; times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path  # of the database and of the files
    database: str | None = None  # SQLAlchemy's URL; None: a SQLite file in `folder`
    weights: Path | None = None
    base: BaseSettings | None = None
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = Field(default=8188, ge=0, le=65_535)
    workers: int = Field(default=1, ge=0, le=64)  # processes started here; 0 if they run elsewhere

    max_batch: int = Field(default=8, ge=1)  # pictures denoised together on one device
    max_queue: int = Field(default=500, ge=1)
    max_queue_per_owner: int = Field(default=128, ge=1)
    max_pictures: int = Field(default=10, ge=1)  # of one job
    max_steps: int = Field(default=150, ge=1)
    max_side: int = Field(default=2048, ge=32)
    requests_per_minute: float = Field(default=600.0, gt=0)  # new jobs of one owner

    max_body: int = Field(default=25 << 20, ge=1024)
    max_photos: int = Field(default=16, ge=1)
    max_photo_pixels: int = 40_000_000
    max_photo_side: int = 8_192
    upload_idle: float = 10.0  # longest wait for the next piece of a body
    upload_time: float = 120.0  # longest time for a whole body
    longest_wait: float = 600.0  # of a request that waits for its job
    connections: int = 1_000

    lease: float = 30.0  # after this time without a sign of life, a worker's jobs are given to another one
    max_attempts: int = 3
    deadline: float = 3_600.0  # a job that has not started by then expires
    stall: float = 300.0  # a worker whose loop makes no step for so long stops renewing its leases
    drain: float = 20.0  # time for running jobs at shutdown
    keep_pictures: float = DAY
    keep_photos: float = 3_600.0
    keep_personas: float = 365 * DAY

    origins: tuple[str, ...] = ()  # web origins that may call the API (CORS)
    hosts: tuple[str, ...] = ()  # further host names by which the server may be called
    log_prompts: bool = False
    marks: MarkSettings = MarkSettings()
    safety: Path | None = None  # folder of an image classifier, which checks photos and pictures
    app: Path | None = None  # folder of the web app, served under /

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder / 'imagine.db'}"

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
