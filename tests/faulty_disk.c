/* A disk that is slow, or that fails, for the files of a training state. Loaded by LD_PRELOAD (tests/test_faults.py).
 *   DISK_DELAY_MS   milliseconds that each write takes
 *   DISK_READS_FAIL rank whose reads fail */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_state(int file) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  const char *end = ".safetensors", *folder = "/step_";
  if (size < (ssize_t)strlen(end)) return 0;
  path[size] = 0;
  return strstr(path, folder) && !strcmp(path + size - strlen(end), end);
}

ssize_t write(int file, const void *data, size_t size) {
  static ssize_t (*next)(int, const void *, size_t);
  if (!next) next = dlsym(RTLD_NEXT, "write");
  const char *delay = getenv("DISK_DELAY_MS");
  if (delay && is_state(file)) usleep(1000 * atoi(delay));
  return next(file, data, size);
}

static int fails(int file) {
  const char *wanted = getenv("DISK_READS_FAIL"), *rank = getenv("RANK");
  return wanted && rank && !strcmp(wanted, rank) && is_state(file);
}

/* What Python's os.preadv calls */
ssize_t preadv2(int file, const struct iovec *into, int count, off_t offset, int flags) {
  static ssize_t (*next)(int, const struct iovec *, int, off_t, int);
  if (!next) next = dlsym(RTLD_NEXT, "preadv2");
  if (!fails(file)) return next(file, into, count, offset, flags);
  errno = EIO;
  return -1;
}

ssize_t preadv64v2(int file, const struct iovec *into, int count, off64_t offset, int flags) {
  return preadv2(file, into, count, offset, flags);
}
