/* The operating system (POSIX): files that are read, memory, threads. os_maps.c has those that are mapped,
 * os_memory.c how much memory there is. */
#define _GNU_SOURCE
#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "error.h"

/* ---- Files and memory ---- */

struct os_file {
    int fd;
    bool direct;
    os_identity identity;
    char *path;
};

static int open_direct(const char *path) {
#ifdef O_DIRECT
    return open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
#else
    (void)path;
    errno = EINVAL;
    return -1;
#endif
}

int os_file_open(const char *path, const os_identity *same, os_file **out, dg_error *error) {
    *out = NULL;
    os_file *f = calloc(1, sizeof *f);
    if (!f || !(f->path = malloc(strlen(path) + 1))) {
        free(f);
        return fail(error, DG_ERROR_SYSTEM, "%s: no memory", path);
    }
    strcpy(f->path, path);
    f->fd = open_direct(path);
    f->direct = f->fd >= 0;
    if (!f->direct) f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* the file system has no direct reads */
    struct stat info;
    if (same) f->identity = *same;
    else if (f->fd >= 0 && fstat(f->fd, &info) == 0) f->identity = os_identity_of(&info);
    const int status = f->fd < 0 ? fail(error, DG_ERROR_SYSTEM, "%s: cannot open: %s", path, strerror(errno))
                                 : os_file_check(f, error);
    if (status != DG_OK) os_file_close(f);
    else *out = f;
    return status;
}

void os_file_close(os_file *f) {
    if (!f) return;
    if (f->fd >= 0) close(f->fd);
    free(f->path);
    free(f);
}

int64_t os_file_read(os_file *f, void *to, int64_t bytes, int64_t offset) {
    ssize_t got;
    do got = pread(f->fd, to, (size_t)bytes, (off_t)offset);
    while (got < 0 && errno == EINTR);
#ifdef O_DIRECT
    if (got < 0 && errno == EINVAL && f->direct) { /* promised at open and refused now */
        f->direct = false;
        if (fcntl(f->fd, F_SETFL, 0) == 0) return os_file_read(f, to, bytes, offset);
    }
#endif
    if (got < 0) return -(int64_t)errno;
#ifdef POSIX_FADV_DONTNEED
    if (!f->direct) posix_fadvise(f->fd, (off_t)offset, (off_t)bytes, POSIX_FADV_DONTNEED);
#endif
    return (int64_t)got;
}

int os_file_check(const os_file *f, dg_error *error) {
    struct stat info;
    if (fstat(f->fd, &info) != 0) return fail(error, DG_ERROR_SYSTEM, "%s: cannot read: %s", f->path, strerror(errno));
    const os_identity now = os_identity_of(&info), *then = &f->identity;
    if (now.device != then->device || now.inode != then->inode)
        return fail(error, DG_ERROR_SYSTEM, "%s: replaced by another file while it was opened", f->path);
    if (now.bytes != then->bytes)
        return fail(error, DG_ERROR_SYSTEM, "%s: changed while it was in use: it had %llu bytes and has %llu", f->path,
                    (unsigned long long)then->bytes, (unsigned long long)now.bytes);
    if (now.changed != then->changed)
        return fail(error, DG_ERROR_SYSTEM, "%s: written to while it was in use", f->path);
    return DG_OK;
}

bool os_file_direct(const os_file *f) { return f->direct; }
int64_t os_file_bytes(const os_file *f) { return (int64_t)f->identity.bytes; }

int64_t os_granule(void) {
    const long page = sysconf(_SC_PAGESIZE);
    return page > 4096 ? (int64_t)page : 4096;
}

void *os_reserve(size_t bytes) {
    void *at =
        mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

void os_release(void *memory, size_t bytes) {
    if (memory) munmap(memory, bytes ? bytes : 1);
}

void os_large_pages(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void os_small_pages(void *memory, size_t bytes) {
#ifdef MADV_NOHUGEPAGE
    madvise(memory, bytes, MADV_NOHUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void os_discard(void *memory, size_t bytes) { madvise(memory, bytes, MADV_DONTNEED); }

int32_t os_processors(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int32_t)n : 1;
}

/* The number that a file of a folder begins with; 0 without one. */
static double number_in(const char *folder, const char *name) {
    char path[512];
    double number = 0.0;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "re");
    if (f && fscanf(f, "%lf", &number) != 1) number = 0.0;
    if (f) fclose(f);
    return number;
}

double os_link_rate(const char *folder) {
    const double port = number_in(folder, "../max_link_speed"), lanes = number_in(folder, "current_link_width");
    double transfers = number_in(folder, "max_link_speed"); /* 10^9 bits per second and lane, those of the coding too */
    if (port > 0 && port < transfers) transfers = port;
    return transfers * 1e9 * lanes / 8 * (transfers > 5 ? 128.0 / 130.0 : 0.8);
}

uint64_t os_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- Threads ---- */

/* a forward pass runs hundreds of short jobs: waiting awake for the next costs less than sleeping */
enum { SPINS = 4000 };

/* A run is published in one word, `state`: its number above, the items not yet taken below. Whoever lowers the count
 * owns that item, and until it is done the run's work and arg stand. A thread that comes late finds no items and is
 * not waited for, so a busy machine costs no more than its share. */
struct pool {
    int32_t threads; /* that were asked for */
    int32_t running; /* of them there are; the caller's is one */
    int32_t generation; /* of processes, that the workers were started in */
    pool *next;
    pthread_t *workers;
    pthread_mutex_t turn; /* held for one run */
    pthread_mutex_t lock; /* guards falling asleep */
    pthread_cond_t wake;
    atomic_ullong state; /* run << 32 | items left */
    atomic_llong done; /* items of this run */
    atomic_int sleepers;
    atomic_bool closing;
    pool_work work;
    void *arg;
    int64_t n_items;
};

struct os_mutex {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    os_mutex *next;
};

/* ---- Forks: a child has none of its parent's threads, and every lock as it stood ---- */

static atomic_int generation; /* of processes: how many forks lie behind this one */
static pthread_mutex_t lists = PTHREAD_MUTEX_INITIALIZER; /* of the two that follow, the oldest first */
static pool *pools;
static os_mutex *mutexes;

#define LINK(list, item)               \
    do {                               \
        pthread_mutex_lock(&lists);    \
        __typeof__(item) *at = &list;  \
        while (*at) at = &(*at)->next; \
        *at = (item);                  \
        pthread_mutex_unlock(&lists);  \
    } while (0)

#define UNLINK(list, item)                                         \
    do {                                                           \
        pthread_mutex_lock(&lists);                                \
        for (__typeof__(item) *at = &list; *at; at = &(*at)->next) \
            if (*at == (item)) {                                   \
                *at = (item)->next;                                \
                break;                                             \
            }                                                      \
        pthread_mutex_unlock(&lists);                              \
    } while (0)

static void make_pool_locks(pool *p) {
    pthread_mutex_init(&p->turn, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    atomic_store(&p->state, 0);
    atomic_store(&p->sleepers, 0);
}

static void make_mutex(os_mutex *m) {
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->changed, NULL);
}

/* No other thread holds a mutex while the process forks: what it guards is whole in the child. */
static void before_fork(void) {
    pthread_mutex_lock(&lists);
    for (os_mutex *m = mutexes; m; m = m->next) pthread_mutex_lock(&m->lock);
}

static void behind_fork(void) {
    for (os_mutex *m = mutexes; m; m = m->next) pthread_mutex_unlock(&m->lock);
    pthread_mutex_unlock(&lists);
}

static void in_child(void) {
    atomic_fetch_add(&generation, 1);
    for (pool *p = pools; p; p = p->next) make_pool_locks(p);
    for (os_mutex *m = mutexes; m; m = m->next) make_mutex(m);
    pthread_mutex_unlock(&lists);
}

/* Before there are threads, so that none is amid this when another one forks. */
__attribute__((constructor)) static void on_forks(void) { pthread_atfork(before_fork, behind_fork, in_child); }

int32_t os_forks(void) { return atomic_load(&generation); }

/* ---- Pools ---- */

typedef struct seat {
    pool *p;
    int32_t thread;
} seat;

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static bool has_items(pool *p) { return (uint32_t)atomic_load(&p->state) != 0; }

static void take_items(pool *p, int32_t thread) {
    unsigned long long state = atomic_load(&p->state);
    while ((uint32_t)state != 0) {
        if (!atomic_compare_exchange_weak(&p->state, &state, state - 1)) continue;
        p->work(p->arg, p->n_items - (int64_t)(uint32_t)state, thread);
        atomic_fetch_add(&p->done, 1);
        state = atomic_load(&p->state);
    }
}

static void *worker(void *arg) {
    const seat s = *(seat *)arg;
    free(arg);
    pool *p = s.p;
    while (!atomic_load(&p->closing)) {
        for (int i = 0; i < SPINS && !has_items(p); i++) pause_briefly();
        if (!has_items(p)) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->sleepers, 1);
            while (!has_items(p) && !atomic_load(&p->closing)) pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->sleepers, 1);
            pthread_mutex_unlock(&p->lock);
        }
        take_items(p, s.thread);
    }
    return NULL;
}

static void wake_sleepers(pool *p) {
    if (atomic_load(&p->sleepers) == 0) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static bool start_workers(pool *p) {
    p->running = 1;
    p->generation = atomic_load(&generation);
    while (p->running < p->threads) {
        seat *to = malloc(sizeof *to);
        if (to) *to = (seat){p, p->running};
        if (!to || pthread_create(&p->workers[p->running], NULL, worker, to) != 0) {
            free(to);
            return false;
        }
        p->running++;
    }
    return true;
}

pool *pool_new(int32_t threads) {
    pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->threads = threads;
    make_pool_locks(p);
    p->workers = calloc((size_t)threads, sizeof *p->workers);
    LINK(pools, p);
    if (p->workers && start_workers(p)) return p;
    pool_free(p);
    return NULL;
}

void pool_free(pool *p) {
    if (!p) return;
    UNLINK(pools, p);
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->closing, true);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int32_t t = 1; t < p->running && p->generation == atomic_load(&generation); t++)
        pthread_join(p->workers[t], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    pthread_mutex_destroy(&p->turn);
    free(p->workers);
    free(p);
}

int32_t pool_threads(const pool *p) { return p->threads; }

void pool_run(pool *p, pool_work work, void *arg, int64_t n_items) {
    pthread_mutex_lock(&p->turn);
    /* of a forked process; it goes on with as many as it gets */
    if (p->generation != atomic_load(&generation)) start_workers(p);
    if (p->running == 1 || n_items <= 1 || n_items > UINT32_MAX) {
        for (int64_t i = 0; i < n_items; i++) work(arg, i, 0);
    } else {
        const unsigned long long run = (atomic_load(&p->state) >> 32) + 1;
        p->work = work;
        p->arg = arg;
        p->n_items = n_items;
        atomic_store(&p->done, 0);
        atomic_store(&p->state, run << 32 | (unsigned long long)n_items);
        wake_sleepers(p);
        take_items(p, 0);
        for (int i = 0; atomic_load(&p->done) < n_items; i++) {
            if (i < SPINS) pause_briefly();
            else sched_yield();
        }
    }
    pthread_mutex_unlock(&p->turn);
}

struct os_thread {
    pthread_t id;
    int32_t generation;
    void (*work)(void *arg);
    void *arg;
};

static void *run_thread(void *arg) {
    os_thread *t = arg;
    t->work(t->arg);
    return NULL;
}

os_thread *os_thread_start(void (*work)(void *arg), void *arg) {
    os_thread *t = malloc(sizeof *t);
    if (!t) return NULL;
    *t = (os_thread){.work = work, .arg = arg, .generation = atomic_load(&generation)};
    if (pthread_create(&t->id, NULL, run_thread, t) == 0) return t;
    free(t);
    return NULL;
}

void os_thread_join(os_thread *t) {
    if (!t) return;
    if (os_thread_runs(t)) pthread_join(t->id, NULL);
    free(t);
}

bool os_thread_runs(const os_thread *t) { return t->generation == atomic_load(&generation); }

os_mutex *os_mutex_new(void) {
    os_mutex *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    make_mutex(m);
    LINK(mutexes, m);
    return m;
}

void os_mutex_free(os_mutex *m) {
    if (!m) return;
    UNLINK(mutexes, m);
    pthread_cond_destroy(&m->changed);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

void os_mutex_lock(os_mutex *m) { pthread_mutex_lock(&m->lock); }
void os_mutex_unlock(os_mutex *m) { pthread_mutex_unlock(&m->lock); }
void os_mutex_wait(os_mutex *m) { pthread_cond_wait(&m->changed, &m->lock); }
void os_mutex_wake_all(os_mutex *m) { pthread_cond_broadcast(&m->changed); }
