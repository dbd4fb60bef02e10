#define _GNU_SOURCE /* mkdtemp */
/* What the system tells of the machine, and what follows where it tells nothing. */
#include "os.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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

int main(void) {
    if (!mkdtemp(folder)) return 1;
    snprintf(device, sizeof device, "%s/0000:01:00.0", folder);
    if (mkdir(device, 0700) != 0) return 1;
    test_link_rate();
    rmdir(device);
    tell(folder, "max_link_speed", NULL);
    rmdir(folder);
    const int64_t all = os_memory(), left = dg_memory_free();
    CHECK(left > 0 && left <= all, "%lld of %lld bytes of memory are free", (long long)left, (long long)all);
    return check_done("os");
}
