"""opsctl: operations of WhatsApp fleets whose Baileys auth state lives in PostgreSQL."""

__version__ = "0.1.0"
