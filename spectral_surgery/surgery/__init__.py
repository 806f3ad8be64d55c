"""Operations on live models; nothing here opens a file."""
