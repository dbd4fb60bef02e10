#define _GNU_SOURCE /* mkdtemp */
/* What the system tells of the machine, and what follows where it tells nothing. */
#include "os.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static char folder[] = "/tmp/dg-os-XXXXXX", device[64];

static void tell(const char *of, const char *name, const char *text) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", of, name);
    if (!text) {
        unlink(path);
        return;
    }
    FILE *f = fopen(path, "w");
    if (f) fputs(text, f), fclose(f);
}

static void test_link_rate(void) {
    const struct {
        const char *speed, *lanes, *port;
        double rate; /* GB/s */
    } links[] = {
        {"16.0 GT/s PCIe\n", "8\n", "16.0 GT/s PCIe\n", 15.754},
        {"32.0 GT/s PCIe\n", "16\n", "32.0 GT/s PCIe\n", 63.015},
        {"32.0 GT/s PCIe\n", "16\n", "8.0 GT/s PCIe\n", 15.754}, /* a new card in an old slot */
        {"8.0 GT/s PCIe\n", "4\n", "16.0 GT/s PCIe\n", 3.938},
        {"5.0 GT/s PCIe\n", "16\n", NULL, 8.0},
        {"16.0 GT/s PCIe\n", "16\n", "Unknown\n", 31.508}, /* a machine inside another */
        {"Unknown\n", "0\n", NULL, 0.0},
        {"Unknown\n", "16\n", "16.0 GT/s PCIe\n", 0.0},
        {"16.0 GT/s PCIe\n", NULL, NULL, 0.0},
        {NULL, NULL, NULL, 0.0},
    };
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        tell(device, "max_link_speed", links[i].speed);
        tell(device, "current_link_width", links[i].lanes);
        tell(folder, "max_link_speed", links[i].port);
        const double rate = os_link_rate(device) / 1e9;
        CHECK(fabs(rate - links[i].rate) < 1e-3, "link %zu: %g GB/s", i, rate);
    }
    CHECK(os_link_rate("/tmp/dg-os-nothing") == 0.0, "a folder that is not there");
}

/* ---- Control groups ---- */

static void tell_group(const char *group, const char *limit, const char *usage, const char *stat, bool unified) {
    char of[96];
    snprintf(of, sizeof of, "%s%s", folder, group);
    mkdir(of, 0700);
    tell(of, unified ? "memory.max" : "memory.limit_in_bytes", limit);
    tell(of, unified ? "memory.current" : "memory.usage_in_bytes", usage);
    tell(of, "memory.stat", stat);
    if (!limit && group[0]) rmdir(of);
}

static void test_control_groups(void) {
    for (int unified = 0; unified < 2; unified++) {
        const char *stat = unified ? "anon 5\ninactive_file 300\nactive_file 40\n"
                                   : "cache 9\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 40\n";
        tell_group("/a", "2000\n", "900\n", stat, unified);
        tell_group("/a/b", "max\n", "900\n", stat, unified);
        CHECK(os_group_memory(folder, "/a", unified) == 1440, "%lld are left",
              (long long)os_group_memory(folder, "/a", unified));
        CHECK(os_group_memory(folder, "/a/b", unified) == 1440, "the limit is that of the group above");
        CHECK(os_group_memory(folder, "/a/b/not-seen-here", unified) == 1440,
              "nor does a group hide it that is not seen");
        tell_group("/a/b", "1000\n", "900\n", NULL, unified);
        CHECK(os_group_memory(folder, "/a/b", unified) == 100, "the lower limit counts");
        tell_group("/a/b", "1000\n", "1200\n", stat, unified);
        CHECK(os_group_memory(folder, "/a/b", unified) == 140, "%lld are left",
              (long long)os_group_memory(folder, "/a/b", unified));
        tell_group("/a/b", "1000\n", "1400\n", stat, unified);
        CHECK(os_group_memory(folder, "/a/b", unified) == 0, "nothing is left where more is used than allowed");
        CHECK(os_group_memory(folder, "/", unified) == -1, "no limit in the root");
        CHECK(os_group_memory(folder, "", unified) == -1, "no limit in the root, without a slash");
        CHECK(os_group_memory("/tmp/dg-os-nothing", "/a/b", unified) == -1, "no such file system");
        tell_group("/a/b", NULL, NULL, NULL, unified);
        tell_group("/a", NULL, NULL, NULL, unified);
    }
}

/* ---- Forks ---- */

enum { FORKS = 400, PATIENCE = 60 }; /* seconds: a child that takes longer hangs */

static atomic_bool stop;
static char mapped[64];
static os_mutex *mutex;
static volatile int64_t first, second; /* guarded by it: the same for whoever holds it */

static void *open_and_close(void *arg) {
    while (!atomic_load(&stop)) {
        const uint8_t *map;
        uint64_t size;
        if (os_map(mapped, &map, &size, NULL, NULL) == DG_OK) os_unmap(map, size);
    }
    return arg;
}

static void *change(void *arg) {
    while (!atomic_load(&stop)) {
        os_mutex_lock(mutex);
        first++;
        for (volatile int i = 0; i < 1000; i++) {
        }
        second++;
        os_mutex_unlock(mutex);
    }
    return arg;
}

/* In a child: 0 if all is as it should be. */
static int child(void) {
    const uint8_t *map;
    uint64_t size;
    alarm(PATIENCE);
    for (int i = 0; i < 3; i++) {
        if (os_map(mapped, &map, &size, NULL, NULL) != DG_OK) return 1;
        os_unmap(map, size);
    }
    os_mutex_lock(mutex);
    const bool same = first == second;
    os_mutex_unlock(mutex);
    return same ? 0 : 2;
}

static void test_forks_beside_threads_that_hold_locks(void) {
    const int32_t before = os_forks();
    int hung = 0, torn = 0, failed = 0;
    pthread_t threads[3];
    snprintf(mapped, sizeof mapped, "%s/mapped", folder);
    tell(folder, "mapped", "something");
    mutex = os_mutex_new();
    for (int i = 0; i < 3; i++)
        if (pthread_create(&threads[i], NULL, i ? open_and_close : change, NULL) != 0) exit(1);
    for (int i = 0; i < FORKS && !hung; i++) {
        const pid_t pid = fork();
        if (pid == 0) _exit(os_forks() == before + 1 ? child() : 3);
        int status = 0;
        if (waitpid(pid, &status, 0) != pid) failed++;
        else if (WIFSIGNALED(status)) hung++;
        else if (WEXITSTATUS(status) == 2) torn++;
        else if (WEXITSTATUS(status)) failed++;
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    CHECK(!hung && !torn && !failed, "of %d children %d hung, %d found what a mutex guards half changed, %d failed",
          FORKS, hung, torn, failed);
    CHECK(os_forks() == before, "the parent counts %d forks", os_forks());
    os_mutex_free(mutex);
    tell(folder, "mapped", NULL);
}

int main(void) {
    if (!mkdtemp(folder)) return 1;
    snprintf(device, sizeof device, "%s/0000:01:00.0", folder);
    if (mkdir(device, 0700) != 0) return 1;
    test_link_rate();
    test_forks_beside_threads_that_hold_locks();
    test_control_groups();
    rmdir(device);
    tell(folder, "max_link_speed", NULL);
    rmdir(folder);
    const int64_t all = os_memory(), left = dg_memory_free();
    CHECK(left > 0 && left <= all, "%lld of %lld bytes of memory are free", (long long)left, (long long)all);
    return check_done("os");
}
