/* NVML's C names over a text file; README.md tells its format. The signatures are those that pynvml calls. */

#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, VERSION_MISMATCH = 25 };
enum { MAX_LINES = 4096, MAX_CARDS = 64, WHOLE = 0 };

static const struct { const char *name; int code; } ERRORS[] = {
    {"UNINITIALIZED", 1}, {"INVALID_ARGUMENT", 2}, {"NOT_SUPPORTED", 3}, {"NO_PERMISSION", 4}, {"NOT_FOUND", 6},
    {"INSUFFICIENT_SIZE", 7}, {"INSUFFICIENT_POWER", 8}, {"DRIVER_NOT_LOADED", 9}, {"TIMEOUT", 10}, {"IRQ_ISSUE", 11},
    {"LIBRARY_NOT_FOUND", 12}, {"FUNCTION_NOT_FOUND", 13}, {"CORRUPTED_INFOROM", 14}, {"GPU_IS_LOST", 15},
    {"RESET_REQUIRED", 16}, {"OPERATING_SYSTEM", 17}, {"LIB_RM_VERSION_MISMATCH", 18}, {"IN_USE", 19}, {"MEMORY", 20},
    {"NO_DATA", 21}, {"INSUFFICIENT_RESOURCES", 23}, {"NOT_READY", 27}, {"GPU_NOT_FOUND", 28}, {"INVALID_STATE", 29},
    {"UNKNOWN", 999},
};

static const char *const KEYS[] = {
    "driver_version", "while_driver", "ids", "subsystem", "name", "uuid", "serial", "vbios", "inforom", "minor",
    "temperature_c", "power_mw", "memory_mib", "memory_used_mib", "persistence", "mig", "ecc", "ecc_uncorrected",
    "retired_pages", "retirement_pending", "remapped_rows", "compute", "graphics", "nvlink", "fail", "hang", "crash",
};

#define COUNT(array) (sizeof(array) / sizeof *(array))

struct line {
    int card; /* as numbered in the file from 1; WHOLE for the lines before the first card */
    char key[32];
    char value[256];
};
struct card {
    int number;
    unsigned domain, bus, device;
    char address[32];
};

static struct line lines[MAX_LINES];
static int line_count;
static struct card cards[MAX_CARDS]; /* those that are listed now */
static unsigned card_count;
static bool initialised;

/* --- The text file --- */

static const char *nth(int card, const char *key, int n)
{
    for (int i = 0; i < line_count; i++)
        if (lines[i].card == card && strcmp(lines[i].key, key) == 0 && n-- == 0)
            return lines[i].value;
    return NULL;
}

static const char *value(int card, const char *key)
{
    return nth(card, key, 0);
}

static bool known(const char *key)
{
    for (size_t i = 0; i < COUNT(KEYS); i++)
        if (strcmp(KEYS[i], key) == 0)
            return true;
    return false;
}

static bool listed(const struct card *card)
{
    const char *driver = value(card->number, "while_driver");
    char path[128], target[PATH_MAX];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver", card->address);
    if (driver == NULL)
        return true;
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (length < 0)
        return false;
    target[length] = '\0';
    const char *slash = strrchr(target, '/');
    return slash != NULL && strcmp(slash + 1, driver) == 0;
}

static int bad(const char *path, const char *text)
{
    fprintf(stderr, "%s: not understood: %s\n", path, text);
    return INVALID_ARGUMENT;
}

static int read_file(const char *path, FILE *file)
{
    static struct card every[MAX_CARDS];
    char text[512];
    int number = WHOLE;
    line_count = 0;
    card_count = 0;
    while (fgets(text, sizeof text, file) != NULL) {
        char *start = text + strspn(text, " \t");
        start[strcspn(start, "\n")] = '\0';
        if (*start == '\0' || *start == '#')
            continue;
        struct line *line = &lines[line_count];
        if (line_count == MAX_LINES || sscanf(start, "%31s %255[^\n]", line->key, line->value) != 2)
            return bad(path, start);
        if (strcmp(line->key, "card") == 0) {
            struct card *card = &every[number];
            if (number == MAX_CARDS
                || sscanf(line->value, "%x:%x:%x.0", &card->domain, &card->bus, &card->device) != 3)
                return bad(path, start);
            snprintf(card->address, sizeof card->address, "%04x:%02x:%02x.0", card->domain, card->bus, card->device);
            card->number = ++number;
            continue;
        }
        if (!known(line->key))
            return bad(path, start);
        line->card = number;
        line_count++;
    }
    for (int i = 0; i < number; i++)
        if (listed(&every[i]))
            cards[card_count++] = every[i];
    return SUCCESS;
}

/* --- Failures --- */

static int code_of(const char *name)
{
    for (size_t i = 0; i < COUNT(ERRORS); i++)
        if (strcmp(ERRORS[i].name, name) == 0)
            return ERRORS[i].code;
    int code = atoi(name);
    return code > 0 ? code : INVALID_ARGUMENT; /* a slip of the pen is no success */
}

static bool names(const char *function, const char *text)
{
    char first[64] = "";
    sscanf(text, "%63s", first);
    return strcmp(first, "*") == 0 || strcmp(first, function) == 0;
}

static int failure_of(int number, const char *function)
{
    const char *text;
    for (int n = 0; (text = nth(number, "hang", n)) != NULL; n++)
        while (names(function, text))
            pause();
    for (int n = 0; (text = nth(number, "crash", n)) != NULL; n++)
        if (names(function, text))
            raise(SIGSEGV);
    for (int n = 0; (text = nth(number, "fail", n)) != NULL; n++) {
        char code[64] = "UNKNOWN";
        sscanf(text, "%*s %63s", code);
        if (names(function, text))
            return code_of(code);
    }
    return SUCCESS;
}

static int failure(const struct card *card, const char *function)
{
    int code = failure_of(WHOLE, function);
    return code == SUCCESS && card != NULL ? failure_of(card->number, function) : code;
}

#define FAIL_AS_TOLD(card)                                                                                             \
    do {                                                                                                               \
        int told = initialised ? failure(card, __func__) : UNINITIALIZED;                                              \
        if (told != SUCCESS)                                                                                           \
            return told;                                                                                               \
    } while (0)

/* --- Kinds of answers --- */

static int text_answer(const char *text, char *buffer, unsigned size)
{
    if (text == NULL)
        return NOT_SUPPORTED;
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return SUCCESS;
}

static int number_answers(const char *text, unsigned *first, unsigned *second)
{
    if (text == NULL)
        return NOT_SUPPORTED;
    int wanted = second == NULL ? 1 : 2;
    return sscanf(text, "%u %u", first, second == NULL ? &(unsigned){0} : second) >= wanted ? SUCCESS : INVALID_ARGUMENT;
}

static unsigned ids_of(const char *text)
{
    unsigned vendor = 0, device = 0;
    if (text != NULL)
        sscanf(text, "%x:%x", &vendor, &device);
    return device << 16 | vendor;
}

#define TEXT(function, key)                                                                                            \
    int function(const struct card *card, char *buffer, unsigned size)                                                 \
    {                                                                                                                  \
        FAIL_AS_TOLD(card);                                                                                            \
        return text_answer(value(card->number, key), buffer, size);                                                    \
    }

#define NUMBER(function, key)                                                                                          \
    int function(const struct card *card, unsigned *answer)                                                            \
    {                                                                                                                  \
        FAIL_AS_TOLD(card);                                                                                            \
        return number_answers(value(card->number, key), answer, NULL);                                                 \
    }

#define TWO_NUMBERS(function, key)                                                                                     \
    int function(const struct card *card, unsigned *current, unsigned *pending)                                        \
    {                                                                                                                  \
        FAIL_AS_TOLD(card);                                                                                            \
        return number_answers(value(card->number, key), current, pending);                                             \
    }

/* --- The whole --- */

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    const char *path = getenv("FAKE_NVML") != NULL ? getenv("FAKE_NVML") : "/etc/fake-nvml.txt";
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return DRIVER_NOT_LOADED;
    int code = read_file(path, file);
    fclose(file);
    code = code == SUCCESS ? failure(NULL, __func__) : code;
    initialised = code == SUCCESS;
    return code;
}

int nvmlShutdown(void)
{
    initialised = false;
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *buffer, unsigned size)
{
    FAIL_AS_TOLD(NULL);
    return text_answer(value(WHOLE, "driver_version"), buffer, size);
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    FAIL_AS_TOLD(NULL);
    *count = card_count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const struct card **card)
{
    if (index >= card_count)
        return INVALID_ARGUMENT; /* also before nvmlInit, which is what lists cards */
    FAIL_AS_TOLD(&cards[index]);
    *card = &cards[index];
    return SUCCESS;
}

/* --- One card --- */

TEXT(nvmlDeviceGetName, "name")
TEXT(nvmlDeviceGetUUID, "uuid")
TEXT(nvmlDeviceGetSerial, "serial")
TEXT(nvmlDeviceGetVbiosVersion, "vbios")
TEXT(nvmlDeviceGetInforomImageVersion, "inforom")
NUMBER(nvmlDeviceGetMinorNumber, "minor")
NUMBER(nvmlDeviceGetPersistenceMode, "persistence")
NUMBER(nvmlDeviceGetPowerUsage, "power_mw")
NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, "retirement_pending")
TWO_NUMBERS(nvmlDeviceGetMigMode, "mig")
TWO_NUMBERS(nvmlDeviceGetEccMode, "ecc")

struct pci_info {
    char legacy_bus_id[16];
    unsigned domain, bus, device, ids, subsystem;
    char bus_id[32];
};

int nvmlDeviceGetPciInfo_v3(const struct card *card, struct pci_info *info)
{
    FAIL_AS_TOLD(card);
    *info = (struct pci_info){
        .domain = card->domain,
        .bus = card->bus,
        .device = card->device,
        .ids = ids_of(value(card->number, "ids")),
        .subsystem = ids_of(value(card->number, "subsystem")),
    };
    return SUCCESS;
}

int nvmlDeviceGetTemperature(const struct card *card, int sensor, unsigned *celsius)
{
    FAIL_AS_TOLD(card);
    return sensor == 0 ? number_answers(value(card->number, "temperature_c"), celsius, NULL) : INVALID_ARGUMENT;
}

struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

int nvmlDeviceGetMemoryInfo_v2(const struct card *card, struct memory_v2 *memory)
{
    FAIL_AS_TOLD(card);
    const char *total = value(card->number, "memory_mib"), *used = value(card->number, "memory_used_mib");
    if (memory->version != (2u << 24 | sizeof *memory))
        return VERSION_MISMATCH;
    if (total == NULL)
        return NOT_SUPPORTED;
    memory->total = strtoull(total, NULL, 10) << 20;
    memory->used = used == NULL ? 0 : strtoull(used, NULL, 10) << 20;
    memory->free = memory->total - memory->used;
    memory->reserved = 0;
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(const struct card *card, int kind, int counter, unsigned long long *count)
{
    FAIL_AS_TOLD(card);
    unsigned counts[2];
    if (kind != 1 || counter < 0 || counter > 1)
        return INVALID_ARGUMENT;
    int code = number_answers(value(card->number, "ecc_uncorrected"), &counts[0], &counts[1]);
    if (code == SUCCESS)
        *count = counts[counter];
    return code;
}

int nvmlDeviceGetRetiredPages(const struct card *card, int cause, unsigned *count, unsigned long long *pages)
{
    FAIL_AS_TOLD(card);
    unsigned counts[2];
    int code = number_answers(value(card->number, "retired_pages"), &counts[0], &counts[1]);
    if (code != SUCCESS || cause < 0 || cause > 1)
        return code == SUCCESS ? INVALID_ARGUMENT : code;
    bool fits = counts[cause] <= *count;
    *count = counts[cause];
    for (unsigned i = 0; fits && i < *count; i++)
        pages[i] = 0x1000ull * (i + 1);
    return fits ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetRemappedRows(
    const struct card *card, unsigned *correctable, unsigned *uncorrectable, unsigned *pending, unsigned *failed)
{
    FAIL_AS_TOLD(card);
    const char *text = value(card->number, "remapped_rows");
    if (text == NULL)
        return NOT_SUPPORTED;
    return sscanf(text, "%u %u %u %u", correctable, uncorrectable, pending, failed) == 4 ? SUCCESS : INVALID_ARGUMENT;
}

struct process {
    unsigned pid;
    unsigned long long memory;
    unsigned gpu_instance, compute_instance;
};

static int processes_answer(const struct card *card, const char *key, unsigned *count, struct process *processes)
{
    unsigned room = *count;
    for (*count = 0; nth(card->number, key, (int)*count) != NULL; ++*count)
        if (*count < room)
            processes[*count] = (struct process){.pid = (unsigned)atoi(nth(card->number, key, (int)*count))};
    return *count <= room ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const struct card *card, unsigned *count, struct process *processes)
{
    FAIL_AS_TOLD(card);
    return processes_answer(card, "compute", count, processes);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(const struct card *card, unsigned *count, struct process *processes)
{
    FAIL_AS_TOLD(card);
    return processes_answer(card, "graphics", count, processes);
}

/* --- NVLink --- */

static int link_of(const struct card *card, unsigned number, char kind[16], char address[32])
{
    const char *text;
    unsigned found;
    for (int n = 0; (text = nth(card->number, "nvlink", n)) != NULL; n++)
        if (sscanf(text, "%u %15s %31s", &found, kind, address) >= 2 && found == number)
            return SUCCESS;
    return value(card->number, "nvlink") == NULL ? NOT_SUPPORTED : INVALID_ARGUMENT;
}

int nvmlDeviceGetNvLinkState(const struct card *card, unsigned number, unsigned *active)
{
    FAIL_AS_TOLD(card);
    char kind[16], address[32];
    int code = link_of(card, number, kind, address);
    *active = code == SUCCESS && strcmp(kind, "down") != 0;
    return code;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(const struct card *card, unsigned number, unsigned *type)
{
    FAIL_AS_TOLD(card);
    char kind[16], address[32];
    int code = link_of(card, number, kind, address);
    *type = code == SUCCESS && strcmp(kind, "switch") == 0 ? 2 : 0;
    return code;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(const struct card *card, unsigned number, struct pci_info *info)
{
    FAIL_AS_TOLD(card);
    char kind[16], address[32] = "";
    int code = link_of(card, number, kind, address);
    *info = (struct pci_info){0};
    if (code == SUCCESS && sscanf(address, "%x:%x:%x", &info->domain, &info->bus, &info->device) != 3)
        return INVALID_ARGUMENT;
    return code;
}
