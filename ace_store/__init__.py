"""The store: everything ACE writes, below one local folder or one s3:// prefix."""

from ace_store.address import Address, ItemReader
from ace_store.current import Current
from ace_store.location import Location, open_location
from ace_store.store import Store

__all__ = ["Address", "Current", "ItemReader", "Location", "Store", "open_location"]
