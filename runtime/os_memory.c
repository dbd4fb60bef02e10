/* How much memory there is (POSIX; Linux tells it as files). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "os.h"

static const char GROUPS[] = "/sys/fs/cgroup";

int64_t os_resident(void) {
    long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f) {
        if (fscanf(f, "%*d %lld", &pages) != 1) pages = 0;
        fclose(f);
    }
    if (pages > 0) return pages * sysconf(_SC_PAGESIZE);
    struct rusage most;
    if (getrusage(RUSAGE_SELF, &most) != 0) return 0;
#ifdef __APPLE__
    return (int64_t)most.ru_maxrss;
#else
    return (int64_t)most.ru_maxrss * 1024;
#endif
}

/* The number behind `name` at the beginning of a line; negative where there is none, as for "max". */
static int64_t number_behind(const char *path, const char *name) {
    FILE *f = fopen(path, "re");
    char line[256], *end;
    int64_t found = -1;
    while (f && found < 0 && fgets(line, sizeof line, f)) {
        if (strncmp(line, name, strlen(name)) != 0) continue;
        const char *from = line + strlen(name);
        const long long number = strtoll(from, &end, 10);
        if (end != from) found = number;
    }
    if (f) fclose(f);
    return found;
}

int64_t os_anonymous(void) {
    const int64_t kib = number_behind("/proc/self/status", "RssAnon:");
    return kib < 0 || kib > INT64_MAX / 1024 ? os_resident() : kib * 1024;
}

static int64_t meminfo(const char *name) {
    const int64_t kib = number_behind("/proc/meminfo", name);
    return kib < 0 || kib > INT64_MAX / 1024 ? -1 : kib * 1024;
}

int64_t os_memory(void) {
    const int64_t told = meminfo("MemTotal:");
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return told >= 0 ? told : pages > 0 && page > 0 ? (int64_t)pages * page : 0;
}

/* ---- Control groups: the limits of containers and services ---- */

/* The files of a group, and the names in memory.stat of its file cache: what was used once, and what more often. */
enum { LIMIT, USAGE, INACTIVE, ACTIVE, NUMBERS };
static const struct {
    const char *file, *name;
} version1[NUMBERS] = {[LIMIT] = {"memory.limit_in_bytes", ""},
                       [USAGE] = {"memory.usage_in_bytes", ""},
                       [INACTIVE] = {"memory.stat", "total_inactive_file "},
                       [ACTIVE] = {"memory.stat", "total_active_file "}},
  version2[NUMBERS] = {[LIMIT] = {"memory.max", ""},
                       [USAGE] = {"memory.current", ""},
                       [INACTIVE] = {"memory.stat", "inactive_file "},
                       [ACTIVE] = {"memory.stat", "active_file "}};

/* Returns the bytes that one group leaves. Its file cache counts as free, as in MemAvailable; negative: no limit. */
static int64_t left_in(const char *folder, bool unified) {
    char path[4352];
    int64_t number[NUMBERS];
    for (int i = 0; i < NUMBERS; i++) {
        const char *file = unified ? version2[i].file : version1[i].file;
        const int n = snprintf(path, sizeof path, "%s/%s", folder, file);
        number[i] =
            n > 0 && (size_t)n < sizeof path ? number_behind(path, unified ? version2[i].name : version1[i].name) : -1;
    }
    if (number[LIMIT] < 0 || number[USAGE] < 0) return -1;
    int64_t left = number[LIMIT] - number[USAGE];
    for (int i = INACTIVE; i < NUMBERS; i++) left += number[i] > 0 ? number[i] : 0;
    if (left > number[LIMIT]) left = number[LIMIT];
    return left > 0 ? left : 0;
}

static int64_t lower(int64_t a, int64_t b) { return a < 0 || (b >= 0 && b < a) ? b : a; }

int64_t os_group_memory(const char *folder, const char *group, bool unified) {
    char path[4096];
    int64_t left = -1;
    const int n = snprintf(path, sizeof path, "%s%s", folder, group);
    if (n < 0 || (size_t)n >= sizeof path) return -1;
    for (char *end = path + n; end && end >= path + strlen(folder); end = strrchr(path, '/')) {
        *end = 0;
        if (strlen(path) < strlen(folder)) break;
        left = lower(left, left_in(path, unified));
    }
    return left;
}

/* Of all groups that the process is in; negative without a limit. */
static int64_t groups_memory(void) {
    FILE *f = fopen("/proc/self/cgroup", "re");
    char line[4096], folder[64];
    int64_t left = -1;
    while (f && fgets(line, sizeof line, f)) { /* number:controllers:/group */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        controllers++;
        if (!*controllers) {
            left = lower(left, os_group_memory(GROUPS, group, true));
            snprintf(folder, sizeof folder, "%s/unified", GROUPS);
            left = lower(left, os_group_memory(folder, group, true));
        } else if (strstr(controllers, "memory")) {
            snprintf(folder, sizeof folder, "%s/memory", GROUPS);
            left = lower(left, os_group_memory(folder, group, false));
        }
    }
    if (f) fclose(f);
    return left;
}

int64_t dg_memory_free(void) {
    const int64_t told = meminfo("MemAvailable:");
    return lower(told >= 0 ? told : os_memory() / 2, groups_memory());
}
