"""Settings of a client."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientTls:
    """Files (PEM) for an encrypted connection."""

    root_certificates: Path | None = None
    """Whom to trust; None takes the system's authorities."""
    certificate: Path | None = None
    """This client's certificate chain, where the server asks for one."""
    key: Path | None = None
    """Its private key; given together with ``certificate``."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together; give both or neither")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """How a client calls its server."""

    timeout_s: float = 30.0
    """Deadline of one call, retries included, above 0. The server is told and drops a request
    whose time has passed.
    """
    max_attempts: int = 4
    """Attempts of one call, at least 1. Only what a server has not begun to work on is sent
    again: it could not be reached, or its queue was full.
    """
    backoff_s: float = 0.1
    """Pause after the first failed attempt, above 0; it doubles each time and is shortened at
    random by up to a half, so that many clients do not return at once.
    """
    max_image_bytes: int = 32 * 2**20
    """Larger files are refused before they are sent, at least 1."""
    keepalive_s: float = 60.0
    """How often a waiting call checks that the server is still there, at least 10."""
    tls: ClientTls | None = None
    """None: an unencrypted connection."""

    def __post_init__(self) -> None:
        lowest = {
            "timeout_s": 1e-3,
            "max_attempts": 1,
            "backoff_s": 1e-3,
            "max_image_bytes": 1,
            "keepalive_s": 10,
        }
        for name, low in lowest.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")
