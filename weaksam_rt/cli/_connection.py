"""Where the server is: the options that every client command shares."""

from dataclasses import dataclass
from pathlib import Path

from weaksam_rt.client import ClientConfig, ClientTls, WeakSamClient


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the server is and how long to wait for it."""

    url: str = "127.0.0.1:8001"
    """Host and gRPC port."""
    timeout_s: float = 30.0
    """Deadline of each image."""
    tls: bool = False
    """Encrypt; trusts the system's authorities unless root_certificates is given."""
    root_certificates: Path | None = None
    """PEM file of the authorities to trust."""
    certificate: Path | None = None
    """PEM file of this client's certificate, where the server asks for one."""
    key: Path | None = None
    """PEM file of its private key."""

    def client(self) -> WeakSamClient:
        """A client with these settings."""
        files = (self.root_certificates, self.certificate, self.key)
        tls = None
        if self.tls or any(files):
            tls = ClientTls(root_certificates=files[0], certificate=files[1], key=files[2])
        return WeakSamClient(self.url, ClientConfig(timeout_s=self.timeout_s, tls=tls))
