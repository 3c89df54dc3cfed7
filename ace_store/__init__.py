"""The store: everything ACE writes, below one local folder or one s3:// prefix."""

from ace_store.current import Current
from ace_store.location import Location, open_location
from ace_store.store import Store

__all__ = ["Current", "Location", "Store", "open_location"]
