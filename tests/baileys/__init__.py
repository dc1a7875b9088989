"""The real Baileys, 6 and 7: makes live conversations and goes on with them from restored folders."""
