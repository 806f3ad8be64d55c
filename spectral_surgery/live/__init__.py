"""Operations on models in memory; nothing here opens a file."""
