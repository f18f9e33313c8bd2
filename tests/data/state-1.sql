-- A state file as the first gpud that could be run wrote it, whose column boot_id was still missing.
BEGIN TRANSACTION;
CREATE TABLE address_claim (
        address     TEXT PRIMARY KEY,
        upstream_id TEXT NOT NULL REFERENCES instance
    ) STRICT, WITHOUT ROWID;
INSERT INTO "address_claim" VALUES('10.77.0.4','i-0000000000000004');
INSERT INTO "address_claim" VALUES('10.77.0.5','i-0000000000000006');
CREATE TABLE event (
        id          INTEGER PRIMARY KEY,
        at          REAL NOT NULL,
        upstream_id TEXT NOT NULL,
        was         TEXT NOT NULL,
        became      TEXT NOT NULL,
        why         TEXT NOT NULL
    ) STRICT;
INSERT INTO "event" VALUES(1,1780000060.0,'i-0000000000000002','','creating/lease_address','order accepted');
INSERT INTO "event" VALUES(2,1780000061.5,'i-0000000000000002','creating/lease_address','creating/clone_disk','');
INSERT INTO "event" VALUES(3,1780000063.0,'i-0000000000000002','creating/clone_disk','creating/write_seed','');
INSERT INTO "event" VALUES(4,1780000064.5,'i-0000000000000002','creating/write_seed','creating/start_domain','');
INSERT INTO "event" VALUES(5,1780000066.0,'i-0000000000000002','creating/start_domain','creating/await_ready','');
INSERT INTO "event" VALUES(6,1780000096.0,'i-0000000000000002','creating/await_ready','creating/await_ready','the guest reported its startup script started');
INSERT INTO "event" VALUES(7,1780000097.5,'i-0000000000000002','creating/await_ready','running/running','');
INSERT INTO "event" VALUES(8,1780000097.5,'i-0000000000000002','running/running','running/running','the startup script ended with exit code 7');
INSERT INTO "event" VALUES(9,1780000097.5,'i-0000000000000002','running/running','stopping/running','the caller asked to terminate it');
INSERT INTO "event" VALUES(10,1780000099.0,'i-0000000000000002','stopping/running','stopping/stop_domain','');
INSERT INTO "event" VALUES(11,1780000100.5,'i-0000000000000002','stopping/stop_domain','stopping/remove_files','');
INSERT INTO "event" VALUES(12,1780000102.0,'i-0000000000000002','stopping/remove_files','stopping/return_address','');
INSERT INTO "event" VALUES(13,1780000103.5,'i-0000000000000002','stopping/return_address','terminated/ended','');
INSERT INTO "event" VALUES(14,1780000163.5,'i-0000000000000003','','creating/lease_address','order accepted');
INSERT INTO "event" VALUES(15,1780000165.0,'i-0000000000000003','creating/lease_address','creating/clone_disk','');
INSERT INTO "event" VALUES(16,1780000166.5,'i-0000000000000003','creating/clone_disk','creating/write_seed','');
INSERT INTO "event" VALUES(17,1780000168.0,'i-0000000000000003','creating/write_seed','error/stop_domain','its virtual machine could not be started (guest_failed)');
INSERT INTO "event" VALUES(18,1780000169.5,'i-0000000000000003','error/stop_domain','error/remove_files','');
INSERT INTO "event" VALUES(19,1780000171.0,'i-0000000000000003','error/remove_files','error/return_address','');
INSERT INTO "event" VALUES(20,1780000172.5,'i-0000000000000003','error/return_address','error/ended','');
INSERT INTO "event" VALUES(21,1780000232.5,'i-0000000000000004','','creating/lease_address','order accepted');
INSERT INTO "event" VALUES(22,1780000234.0,'i-0000000000000004','creating/lease_address','creating/clone_disk','');
INSERT INTO "event" VALUES(23,1780000235.5,'i-0000000000000004','creating/clone_disk','creating/write_seed','');
INSERT INTO "event" VALUES(24,1780000237.0,'i-0000000000000004','creating/write_seed','creating/start_domain','');
INSERT INTO "event" VALUES(25,1780000238.5,'i-0000000000000004','creating/start_domain','creating/await_ready','');
INSERT INTO "event" VALUES(26,1780000279.5,'i-0000000000000004','creating/await_ready','creating/await_ready','the guest reported its startup script started');
INSERT INTO "event" VALUES(27,1780000281.0,'i-0000000000000004','creating/await_ready','running/running','');
INSERT INTO "event" VALUES(28,1780000341.0,'i-0000000000000005','','creating/lease_address','order accepted');
INSERT INTO "event" VALUES(29,1780000342.5,'i-0000000000000005','creating/lease_address','creating/clone_disk','');
INSERT INTO "event" VALUES(30,1780000402.5,'i-0000000000000006','','creating/lease_address','order accepted');
INSERT INTO "event" VALUES(31,1780000404.0,'i-0000000000000006','creating/lease_address','creating/clone_disk','');
INSERT INTO "event" VALUES(32,1780000405.5,'i-0000000000000006','creating/clone_disk','creating/write_seed','');
INSERT INTO "event" VALUES(33,1780000407.0,'i-0000000000000006','creating/write_seed','creating/start_domain','');
INSERT INTO "event" VALUES(34,1780000408.5,'i-0000000000000006','creating/start_domain','creating/await_ready','');
INSERT INTO "event" VALUES(35,1780000408.5,'i-0000000000000006','creating/await_ready','stopping/await_ready','the caller asked to terminate it');
INSERT INTO "event" VALUES(36,1780000410.0,'i-0000000000000006','stopping/await_ready','stopping/stop_domain','termination comes first');
INSERT INTO "event" VALUES(37,1780000411.5,'i-0000000000000006','stopping/stop_domain','stopping/remove_files','');
INSERT INTO "event" VALUES(38,1780000471.5,'i-0000000000000007','','creating/lease_address','order accepted');
INSERT INTO "event" VALUES(39,1780000473.0,'i-0000000000000007','creating/lease_address','creating/clone_disk','');
INSERT INTO "event" VALUES(40,1780000474.5,'i-0000000000000007','creating/clone_disk','creating/write_seed','');
INSERT INTO "event" VALUES(41,1780000476.0,'i-0000000000000007','creating/write_seed','creating/start_domain','');
INSERT INTO "event" VALUES(42,1780000477.5,'i-0000000000000007','creating/start_domain','error/stop_domain','no boot');
CREATE TABLE gpu_claim (
        gpu         TEXT PRIMARY KEY,
        upstream_id TEXT NOT NULL REFERENCES instance
    ) STRICT, WITHOUT ROWID;
INSERT INTO "gpu_claim" VALUES('ffffffff:00:00.0','i-0000000000000004');
INSERT INTO "gpu_claim" VALUES('ffffffff:01:00.0','i-0000000000000005');
INSERT INTO "gpu_claim" VALUES('ffffffff:02:00.0','i-0000000000000005');
INSERT INTO "gpu_claim" VALUES('ffffffff:03:00.0','i-0000000000000006');
INSERT INTO "gpu_claim" VALUES('ffffffff:04:00.0','i-0000000000000007');
CREATE TABLE guest_input (
        upstream_id     TEXT PRIMARY KEY REFERENCES instance,
        ssh_public_keys TEXT NOT NULL,
        docker_image    TEXT,
        startup_script  BLOB
    ) STRICT, WITHOUT ROWID;
INSERT INTO "guest_input" VALUES('i-0000000000000004','["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleKey gpu.ai"]','nvcr.io/nvidia/pytorch:24.05-py3',X'0102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F202122232425262728292A2B2C2D2E2F303132333435363738393A3B3C3D3E3F404142434445464748494A4B4C4D4E4F505152535455565758595A5B5C5D5E5F606162636465666768696A6B6C6D6E6F707172737475767778797A7B7C7D7E7F808182838485868788898A8B8C8D8E8F909192939495969798999A9B9C9D9E9FA0A1A2A3A4A5A6A7A8A9AAABACADAEAFB0B1B2B3B4B5B6B7B8B9BABBBCBDBEBFC0C1C2C3C4C5C6C7C8C9CACBCCCDCECFD0D1D2D3D4D5D6D7D8D9DADBDCDDDEDFE0E1E2E3E4E5E6E7E8E9EAEBECEDEEEFF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF');
INSERT INTO "guest_input" VALUES('i-0000000000000005','["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleKey gpu.ai"]',NULL,X'23212F62696E2F73680A657865632074756E6E656C0A');
INSERT INTO "guest_input" VALUES('i-0000000000000006','["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleKey gpu.ai"]',NULL,X'23212F62696E2F73680A657865632074756E6E656C0A');
INSERT INTO "guest_input" VALUES('i-0000000000000007','[]',NULL,NULL);
CREATE TABLE instance (
        upstream_id         TEXT PRIMARY KEY,
        instance_id         TEXT NOT NULL UNIQUE,
        fingerprint         TEXT NOT NULL,
        tier                TEXT NOT NULL,
        gpu_type            TEXT NOT NULL,
        gpu_count           INTEGER NOT NULL,
        cpu_cores           INTEGER NOT NULL,
        memory_mib          INTEGER NOT NULL,
        storage_gib         INTEGER NOT NULL,
        gpus                TEXT NOT NULL,
        address             TEXT,
        image_digest        TEXT NOT NULL,
        cost_per_hour       TEXT NOT NULL,
        region              TEXT NOT NULL,
        datacenter_location TEXT NOT NULL,
        status              TEXT NOT NULL,
        step                TEXT NOT NULL,
        step_since          REAL NOT NULL,
        created_at          REAL NOT NULL,
        running_at          REAL,
        ended_at            REAL,
        delete_requested_at REAL,
        failure             TEXT,
        guest_boots         INTEGER NOT NULL,
        boots_at_start      INTEGER NOT NULL,
        script_exit_code    INTEGER,
        restarts            INTEGER NOT NULL,
        last_start_at       REAL
    ) STRICT, WITHOUT ROWID;
INSERT INTO "instance" VALUES('i-0000000000000002','deleted','1185f37d33b0f89e331f101a51bb8e51165c7efda15950b86a3ebcbb363f898e','on_demand','h100_sxm',1,4,16384,100,'[["ffffffff:00:00.0", true]]','10.77.0.2','sha256:abababababababababababababababababababababababababababababababab','3.49','US','US-East-1','terminated','ended',1780000103.5,1780000060.0,1780000096.0,1780000103.5,1780000097.5,NULL,1,0,7,0,NULL);
INSERT INTO "instance" VALUES('i-0000000000000003','failed','5d28a90f4498a81461efbaf6f628a19d9778390bb5c81a393dd936181cc3d826','on_demand','h100_sxm',1,4,16384,100,'[["ffffffff:01:00.0", true]]','10.77.0.3','sha256:abababababababababababababababababababababababababababababababab','3.49','US','US-East-1','error','ended',1780000172.5,1780000163.5,NULL,1780000172.5,NULL,'its virtual machine could not be started (guest_failed)',0,0,NULL,0,NULL);
INSERT INTO "instance" VALUES('i-0000000000000004','running','c071cf5f5ed6f884cc70155b6f05f755fd46a302d05e4261b7e92ce878bbfed8','on_demand','h100_sxm',1,4,16384,100,'[["ffffffff:00:00.0", true]]','10.77.0.4','sha256:abababababababababababababababababababababababababababababababab','3.49','US','US-East-1','running','running',1780000281.0,1780000232.5,1780000279.5,NULL,NULL,NULL,1,0,NULL,0,NULL);
INSERT INTO "instance" VALUES('i-0000000000000005','creating','7f9c40c9ac6a25c178d0c3fa6a26aa3fa0acc1335bb0fccfe61aa03e21872145','on_demand','h100_sxm',2,8,32768,200,'[["ffffffff:01:00.0", true], ["ffffffff:02:00.0", true]]',NULL,'sha256:abababababababababababababababababababababababababababababababab','6.98','US','US-East-1','creating','clone_disk',1780000342.5,1780000341.0,NULL,NULL,NULL,NULL,0,0,NULL,0,NULL);
INSERT INTO "instance" VALUES('i-0000000000000006','stopping','9ea90488b5c8219acc0b2eb36f115242abdbc865d061c24f2c8dfc0c9b57efab','on_demand','h100_sxm',1,4,16384,100,'[["ffffffff:03:00.0", true]]','10.77.0.5','sha256:abababababababababababababababababababababababababababababababab','3.49','US','US-East-1','stopping','remove_files',1780000411.5,1780000402.5,NULL,NULL,1780000408.5,NULL,0,0,NULL,0,NULL);
INSERT INTO "instance" VALUES('i-0000000000000007','failing','5f76b3ec626ebf4e675bd5767dd1671758b70b3550b1e2ee86e2cc1f20e42cf2','on_demand','h100_sxm',1,4,16384,100,'[["ffffffff:04:00.0", true]]',NULL,'sha256:abababababababababababababababababababababababababababababababab','3.49','US','US-East-1','error','stop_domain',1780000477.5,1780000471.5,NULL,NULL,NULL,'its guest did not report the startup script started within 900 s',0,0,NULL,0,NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO "meta" VALUES('owner','0000000000000001');
CREATE INDEX instance_live ON instance (step) WHERE step != 'ended';
CREATE INDEX instance_boots ON instance (gpu_type, gpu_count, running_at)
        WHERE running_at IS NOT NULL;
CREATE INDEX event_instance ON event (upstream_id, id);
PRAGMA user_version = 1;
COMMIT;
