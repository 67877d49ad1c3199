"""Moved to orchestration.runs."""

from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import LEASE_SECONDS, Lease, LeaseHeldError, LeaseLostError, check_lease

__all__ = ["LEASE_SECONDS", "Lease", "LeaseHeldError", "LeaseLostError", "RunFolder", "check_lease"]
