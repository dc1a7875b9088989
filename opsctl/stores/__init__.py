"""Where auth state lives; every store speaks the same records."""
