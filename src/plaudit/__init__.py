"""plaudit: learning from what people prefer."""
