-- What was done to the files of an imported version, for its owner.

ALTER TABLE versions ADD COLUMN note TEXT;
