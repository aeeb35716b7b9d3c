-- What a version is: all that were made before are LoRAs.

ALTER TABLE versions ADD COLUMN kind TEXT NOT NULL DEFAULT 'lora';
