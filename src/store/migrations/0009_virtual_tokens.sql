-- How many tokens a version puts before a sequence: none of those that were made before does.

ALTER TABLE versions ADD COLUMN virtual_tokens INTEGER NOT NULL DEFAULT 0;
