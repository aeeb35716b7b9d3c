-- How large a dataset's file is unpacked, by which memory is reserved for reading it. NULL: of an earlier build, found out by reading it.

ALTER TABLE datasets ADD COLUMN unpacked_bytes INTEGER;
