/* Files mapped into memory (POSIX), and what becomes of a map whose file shrinks or cannot be read any more.
 *
 * Touching such a page raises SIGBUS in whatever thread does it. While files are mapped, a handler puts zeros in the
 * place of the rest of the map and notes that it is lost; the thread goes on, and whoever began the work asks
 * os_map_check at its end. So no thread is jumped out of, and no lock stays held. A SIGBUS of anything else goes to
 * who handled it before. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "os.h"

/* A map, in a list that the handler reads at any time: its entries are used again, and never freed. */
typedef struct region {
    atomic_uintptr_t from, to; /* to 0: free */
    atomic_bool lost;
    struct region *next;
} region;

static _Atomic(region *) regions;
static atomic_bool any_lost; /* ever: what is asked after every pass */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of what follows, and of entries taken and given back */
static int32_t maps;
static struct sigaction before; /* who handled SIGBUS */
static uintptr_t page_bytes;

/* A fork waits until nobody holds the lock, and both processes find it free. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void behind_fork(void) { pthread_mutex_unlock(&lock); }
__attribute__((constructor)) static void on_forks(void) { pthread_atfork(before_fork, behind_fork, behind_fork); }

static region *region_of(uintptr_t at) {
    for (region *r = atomic_load(&regions); r; r = r->next)
        if (at < atomic_load(&r->to) && at >= atomic_load(&r->from)) return r;
    return NULL;
}

static void pass_on(int number, siginfo_t *info, void *context) {
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else if (before.sa_handler == SIG_DFL ||
               info->si_code > 0) { /* a fault cannot be ignored: it comes again, and ends the process */
        signal(number, SIG_DFL);
        if (info->si_code <= 0) raise(number);
    }
}

static void on_fault(int number, siginfo_t *info, void *context) {
    const int was = errno;
    const uintptr_t at = (uintptr_t)info->si_addr, page = at / page_bytes * page_bytes;
    region *r = info->si_code > 0 ? region_of(at) : NULL; /* 0 or less: sent by a process */
    const uintptr_t to = r ? atomic_load(&r->to) : 0;
    if (r && to > page &&
        mmap((void *)page, to - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) !=
            MAP_FAILED) {
        atomic_store(&r->lost, true);
        atomic_store(&any_lost, true);
    } else {
        pass_on(number, info, context);
    }
    errno = was;
}

/* False without memory. */
static bool guard(const uint8_t *map, uint64_t size) {
    pthread_mutex_lock(&lock);
    region *r = atomic_load(&regions);
    while (r && atomic_load(&r->to)) r = r->next;
    if (!r && (r = calloc(1, sizeof *r))) {
        r->next = atomic_load(&regions);
        atomic_store(&regions, r);
    }
    if (r && maps++ == 0) {
        struct sigaction own = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
        sigemptyset(&own.sa_mask);
        page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
        sigaction(SIGBUS, &own, &before);
    }
    if (r) {
        atomic_store(&r->lost, false);
        atomic_store(&r->from, (uintptr_t)map);
        atomic_store(&r->to, (uintptr_t)map + (uintptr_t)size);
    }
    pthread_mutex_unlock(&lock);
    return r != NULL;
}

static void unguard(const uint8_t *map) {
    pthread_mutex_lock(&lock);
    region *r = region_of((uintptr_t)map);
    if (r) {
        atomic_store(&r->to, 0);
        struct sigaction now;
        /* Where someone came after us, our handler stays in the chain and passes everything on. */
        if (--maps == 0 && sigaction(SIGBUS, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO &&
            now.sa_sigaction == on_fault)
            sigaction(SIGBUS, &before, NULL);
    }
    pthread_mutex_unlock(&lock);
}

static int64_t nanoseconds_of(const struct stat *info) {
#ifdef __APPLE__
    return (int64_t)info->st_mtimespec.tv_sec * 1000000000 + info->st_mtimespec.tv_nsec;
#else
    return (int64_t)info->st_mtim.tv_sec * 1000000000 + info->st_mtim.tv_nsec;
#endif
}

os_identity os_identity_of(const struct stat *info) {
    return (os_identity){.device = (uint64_t)info->st_dev,
                         .inode = (uint64_t)info->st_ino,
                         .bytes = (uint64_t)info->st_size,
                         .changed = nanoseconds_of(info)};
}

int os_map(const char *path, const uint8_t **map, uint64_t *size, os_identity *identity, dg_error *error) {
    *map = NULL;
    *size = 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); /* nobody waits for a pipe's other end */
    if (fd < 0) return fail(error, DG_ERROR_SYSTEM, "%s: cannot open: %s", path, strerror(errno));
    struct stat info;
    int status = DG_OK;
    if (fstat(fd, &info) != 0) status = fail(error, DG_ERROR_SYSTEM, "%s: cannot read: %s", path, strerror(errno));
    else if (!S_ISREG(info.st_mode)) status = fail(error, DG_ERROR_SYSTEM, "%s: not a regular file", path);
    else if (info.st_size == 0) status = fail(error, DG_ERROR_FORMAT, "%s: the file is empty", path);
    if (status == DG_OK) {
        void *at = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED) status = fail(error, DG_ERROR_SYSTEM, "%s: cannot map: %s", path, strerror(errno));
        else if (!guard(at, (uint64_t)info.st_size)) {
            munmap(at, (size_t)info.st_size);
            status = fail(error, DG_ERROR_SYSTEM, "%s: no memory", path);
        } else *map = at, *size = (uint64_t)info.st_size;
        if (identity) *identity = os_identity_of(&info);
    }
    close(fd);
    return status;
}

void os_unmap(const uint8_t *map, uint64_t size) {
    unguard(map);
    munmap((void *)(uintptr_t)map, (size_t)size);
}

int os_map_check(const char *path, const uint8_t *map, uint64_t size, dg_error *error) {
    if (!atomic_load(&any_lost)) return DG_OK;
    const region *r = region_of((uintptr_t)map);
    if (!r || !atomic_load(&r->lost)) return DG_OK;
    struct stat info;
    if (stat(path, &info) == 0 && (uint64_t)info.st_size < size)
        return fail(error, DG_ERROR_SYSTEM, "%s: shrank while it was in use: it had %llu bytes and has %llu", path,
                    (unsigned long long)size, (unsigned long long)info.st_size);
    return fail(error, DG_ERROR_SYSTEM,
                "%s: cannot be read any more: an error of the disk, or the file was cut while it was in use", path);
}

bool os_own(const uint8_t *map, uint64_t keep, uint64_t size) {
    void *copy = malloc(keep ? (size_t)keep : 1), *at = (void *)(uintptr_t)map;
    if (!copy) return false;
    memcpy(copy, map, (size_t)keep);
    const bool done = mmap(at, (size_t)size, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
    if (done) memcpy(at, copy, (size_t)keep);
    free(copy);
    return done;
}
