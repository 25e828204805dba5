/*
 * load: keeps N clients calling a server over a Unix socket, and measures what they see.
 *
 *     cc -O2 -o load load.c
 *     load --socket PATH --clients N --seconds S [--calls M] --form oneshot|framed|http
 *          [--pipeline K] [--shutdown] --request FILE|-
 *
 * Each client is always in a call (a closed loop): it starts the next as soon as the last is
 * answered. `oneshot` opens a connection per call, sends the JSON and reads to end of file;
 * `framed` keeps one connection and puts a 4-byte big-endian length before each message, with K
 * requests under way; `http` keeps one too, sends its bytes as they are, and takes replies by their
 * Content-Length. The bytes of `oneshot` may be of any protocol in which the server closes after
 * its reply. A run ends after S seconds or M calls; calls under way then are still
 * waited for, up to DRAIN_SECONDS.
 *
 * One thread drives all clients through epoll. The generator shares the cores with the server
 * under test, so what counts is CPU per call: N blocking threads pay a context switch or two per
 * call, while this loop picks up whatever has been answered since it last looked. The README has
 * the measurement. A latency runs from the first attempt to connect (oneshot) or from the
 * request's being queued (framed) to the moment when its reply is complete and has been checked.
 *
 * Prints one JSON object on stdout: `calls` are the successful ones, and the latencies are theirs;
 * `errors` are the refused, failed and broken ones, of which the first is shown on stderr;
 * `unanswered` are those still under way at the end. Exit 0: every reply was a success; 1: some
 * were not, or were never given; 2: wrong usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    DRAIN_SECONDS = 30,     /* how long unanswered calls are waited for after the end */
    RETRY_MS = 1,           /* longest pause before waiting clients try to connect again */
    EVENTS = 256,           /* epoll events taken at once */
    RECEIVE_BYTES = 65536,  /* first size of a client's receive buffer */
    SUB_BITS = 7,           /* 128 buckets per power of two: within 0.8 % */
    SUB = 1 << SUB_BITS,
};

struct client {
    int fd;                 /* -1: not connected */
    bool queued;            /* in the queue of clients that wait to connect */
    bool watching_output;   /* EPOLLOUT is asked for: the socket's send buffer was full */
    uint64_t *started;      /* ring of `pipeline` start times of the calls under way, in ns */
    unsigned oldest;        /* index in `started` of the call answered next */
    unsigned under_way;     /* calls started and not yet answered */
    size_t send_at;         /* next byte to send, as an offset into the prepared output */
    size_t send_left;       /* bytes still to send */
    char *in;               /* bytes received and not yet taken as replies */
    size_t in_length, in_capacity;
};

static struct {
    const char *socket_path;
    unsigned clients, pipeline;
    double seconds;
    uint64_t calls;
    bool framed, http, shutdown;
} option = {.clients = 16, .pipeline = 1};

static struct sockaddr_un address;
static char *output;         /* framed: `pipeline` copies of the frame, one after the other */
static size_t message_bytes; /* one request as it goes over the wire */
static int epoll_fd;

/* Clients that wait to connect, longest waiting first: a ring with room for all clients. */
static struct client **queue;
static unsigned queue_first, queue_length;

static bool stopping;        /* no further calls are started */
static uint64_t started_calls, answered, errors, under_way, backlog_full, reconnects;
static uint64_t begin_ns, last_answer_ns, max_ns;
static uint64_t histogram[(64 - SUB_BITS + 1) * SUB];

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        die("out of memory");
    return memory;
}

/* --- latencies ------------------------------------------------------------------------- */

/* Values below SUB have a bucket each; above, each power of two is cut into SUB buckets. */
static void record(uint64_t ns)
{
    unsigned shift = ns < SUB ? 0 : (unsigned)(63 - __builtin_clzll(ns)) - SUB_BITS;
    histogram[shift * SUB + (ns >> shift)]++;
    if (ns > max_ns)
        max_ns = ns;
}

/* The middle of the bucket that holds the given share of all recorded latencies. */
static double percentile_us(double share)
{
    uint64_t total = 0, seen = 0;
    for (size_t i = 0; i < sizeof histogram / sizeof *histogram; i++)
        total += histogram[i];
    if (!total)
        return 0;
    double wanted = share * (double)total;
    for (size_t i = 0; i < sizeof histogram / sizeof *histogram; i++) {
        seen += histogram[i];
        if (histogram[i] && (double)seen >= wanted) {
            if (i < 2 * SUB)
                return (double)i / 1e3;
            unsigned shift = (unsigned)(i >> SUB_BITS) - 1;
            uint64_t low = ((uint64_t)(i & (SUB - 1)) + SUB) << shift;
            uint64_t middle = low + (1ull << shift) / 2;
            return (double)(middle < max_ns ? middle : max_ns) / 1e3;
        }
    }
    return (double)max_ns / 1e3;
}

/* --- one client ------------------------------------------------------------------------ */

static void advance(struct client *c);

static bool may_start(void)
{
    return !stopping && (!option.calls || started_calls < option.calls);
}

static void start_call(struct client *c, uint64_t at)
{
    c->started[(c->oldest + c->under_way) % option.pipeline] = at;
    c->under_way++;
    c->send_left += message_bytes;
    started_calls++;
    under_way++;
}

static void say_first_error(const char *what, const char *bytes, size_t length)
{
    if (errors)
        return;
    fprintf(stderr, "load: first error: %s%.*s\n", what, (int)(length > 4000 ? 4000 : length),
            bytes);
}

static void finish_call(struct client *c, bool success, uint64_t at)
{
    uint64_t took = at - c->started[c->oldest];
    c->oldest = (c->oldest + 1) % option.pipeline;
    c->under_way--;
    under_way--;
    last_answer_ns = at;
    if (success) {
        answered++;
        record(took);
    } else {
        errors++;
    }
}

static void disconnect(struct client *c)
{
    if (c->fd >= 0)
        close(c->fd); /* epoll forgets a closed descriptor by itself */
    c->fd = -1;
    c->in_length = 0;
    c->watching_output = false;
}

static void queue_to_connect(struct client *c)
{
    if (!c->queued) {
        c->queued = true;
        queue[(queue_first + queue_length++) % option.clients] = c;
    }
}

/* All calls under way on this connection have failed; the client goes on when its turn comes. */
static void fail(struct client *c, const char *what, int error)
{
    char text[200];
    snprintf(text, sizeof text, "%s%s%s", what, error ? ": " : "", error ? strerror(error) : "");
    say_first_error(text, "", 0);
    uint64_t at = now_ns();
    while (c->under_way)
        finish_call(c, false, at);
    c->send_left = 0;
    disconnect(c);
    queue_to_connect(c);
}

static void watch(struct client *c, bool added, bool for_output)
{
    struct epoll_event event = {
        .events = EPOLLIN | (for_output ? (unsigned)EPOLLOUT : 0u),
        .data.ptr = c,
    };
    if (epoll_ctl(epoll_fd, added ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event))
        die("epoll_ctl: %s", strerror(errno));
    c->watching_output = for_output;
}

/* False: not sent to the end now; epoll will tell when to go on, or the connection is gone. */
static bool send_pending(struct client *c)
{
    size_t prepared = message_bytes * option.pipeline;
    while (c->send_left) {
        size_t length = prepared - c->send_at;
        if (length > c->send_left)
            length = c->send_left;
        ssize_t sent = send(c->fd, output + c->send_at, length, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN) {
            if (!c->watching_output)
                watch(c, true, true);
            return false;
        }
        /* A server that has refused the request and closed makes the send fail, but its reply
         * can still be read: leave the verdict to the reading side. */
        if (sent < 0 && errno == EPIPE) {
            c->send_left = 0;
            c->send_at = 0;
            break;
        }
        if (sent < 0) {
            fail(c, "send", errno);
            return false;
        }
        c->send_left -= (size_t)sent;
        c->send_at = (c->send_at + (size_t)sent) % prepared;
    }
    if (c->watching_output)
        watch(c, true, false);
    if (option.shutdown && !option.framed && !option.http)
        shutdown(c->fd, SHUT_WR);
    return true;
}

/* Connects and sends. False: the listener's backlog is full (EAGAIN), nothing was done. */
static bool try_to_connect(struct client *c)
{
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die("socket: %s", strerror(errno));
    while (connect(c->fd, (struct sockaddr *)&address, sizeof address)) {
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN) {
            backlog_full++;
            disconnect(c);
            return false;
        }
        fail(c, "connect", errno);
        return true;
    }
    c->send_at = 0;
    watch(c, false, false);
    send_pending(c);
    return true;
}

static void start_calls(struct client *c)
{
    uint64_t at = 0;
    while (c->under_way < option.pipeline && may_start()) {
        if (!at)
            at = now_ns();
        start_call(c, at);
    }
}

/* Fills the client's share of calls and gets them on their way. A full backlog offers nothing to
 * wait on without blocking, so clients queue up here, first come first served as the kernel does
 * it for those that block in connect(); the clocks of their calls keep running. */
static void advance(struct client *c)
{
    start_calls(c);
    if (!c->under_way)
        return;
    if (c->fd >= 0)
        send_pending(c);
    else if (queue_length || !try_to_connect(c))
        queue_to_connect(c);
}

/* Called each time that the loop comes round: connects as many of the queue as there is room for. */
static void serve_queue(void)
{
    /* Those that fail now go to the end, so each is tried at most once. */
    for (unsigned count = queue_length; count; count--) {
        struct client *c = queue[queue_first];
        start_calls(c);
        if (c->under_way && !try_to_connect(c))
            return; /* and there is no room for the others either */
        bool failed = c->fd < 0 && may_start();
        queue_first = (queue_first + 1) % option.clients;
        queue_length--;
        c->queued = false;
        if (failed)
            queue_to_connect(c);
    }
}

/* --- replies ---------------------------------------------------------------------------- */

static bool is_success(const char *reply, size_t length)
{
    static const char key[] = "\"success\":true";
    if (memmem(reply, length, key, sizeof key - 1))
        return true;
    say_first_error("", reply, length);
    return false;
}

/* The server has said, by a frame of length 0, that no further request on this connection was or
 * will be read: what it hasn't answered may be sent again on a new one. */
static void reconnect(struct client *c)
{
    reconnects++;
    disconnect(c);
    c->send_left = c->under_way * message_bytes;
    advance(c);
}

/* Finds the next reply in the bytes received: false if not even its length is there. */
static bool find_reply(const char *in, size_t have, size_t *head, size_t *length)
{
    if (option.http) {
        static const char name[] = "\r\nContent-Length:", end[] = "\r\n\r\n";
        const char *body = memmem(in, have, end, sizeof end - 1);
        if (!body)
            return false;
        *head = (size_t)(body - in) + sizeof end - 1;
        *length = 0;
        for (const char *at = in; at + sizeof name - 1 <= body; at++)
            if (!strncasecmp(at, name, sizeof name - 1))
                *length = strtoul(at + sizeof name - 1, NULL, 10);
        return true;
    }
    if (have < 4)
        return false;
    const unsigned char *bytes = (const unsigned char *)in;
    *head = 4;
    *length = (size_t)bytes[0] << 24 | (size_t)bytes[1] << 16 | (size_t)bytes[2] << 8 | bytes[3];
    return true;
}

/* Takes all complete replies of a kept connection. False: the connection was given up. */
static bool take_replies(struct client *c)
{
    size_t at = 0, head, length;
    uint64_t now = now_ns();
    while (find_reply(c->in + at, c->in_length - at, &head, &length)) {
        if (length == 0 && option.framed) {
            reconnect(c);
            return false;
        }
        if (c->in_length - at - head < length)
            break;
        if (!c->under_way) {
            fail(c, "a reply without a request", 0);
            return false;
        }
        finish_call(c, is_success(c->in + at + head, length), now);
        at += head + length;
    }
    c->in_length -= at;
    if (at && c->in_length)
        memmove(c->in, c->in + at, c->in_length);
    return true;
}

static void receive(struct client *c, bool peer_has_closed)
{
    for (;;) {
        if (c->in_length == c->in_capacity) {
            c->in_capacity *= 2;
            c->in = realloc(c->in, c->in_capacity);
            if (!c->in)
                die("out of memory");
        }
        size_t room = c->in_capacity - c->in_length;
        ssize_t got = recv(c->fd, c->in + c->in_length, room, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return;
        /* A server that closes with a part of the request unread resets the connection, but what
         * it had sent before is a reply all the same. */
        if (got < 0 && errno == ECONNRESET && c->in_length)
            got = 0;
        if (got < 0) {
            fail(c, "recv", errno);
            return;
        }
        c->in_length += (size_t)got;
        bool emptied = (size_t)got < room;
        if (option.framed || option.http) {
            if (got == 0 && !c->under_way) {
                disconnect(c);
                return;
            }
            if (got == 0) {
                fail(c, "closed by the server before a reply", 0);
                return;
            }
            if (!take_replies(c))
                return;
            if (emptied) {
                advance(c);
                return;
            }
        } else if (got == 0 || (emptied && peer_has_closed)) {
            /* A read that leaves room has taken all there was; if the peer had closed before it,
             * that was the end, and no second read is needed to learn so. */
            if (c->in_length == 0) {
                fail(c, "closed by the server without a reply", 0);
                return;
            }
            bool success = is_success(c->in, c->in_length);
            c->send_left = 0;
            disconnect(c);
            finish_call(c, success, now_ns());
            advance(c);
            return;
        }
    }
}

/* --- the run ---------------------------------------------------------------------------- */

static void run(struct client *clients)
{
    struct epoll_event events[EVENTS];
    begin_ns = last_answer_ns = now_ns();
    uint64_t end_ns = begin_ns + (uint64_t)(option.seconds * 1e9);

    for (unsigned i = 0; i < option.clients; i++)
        advance(&clients[i]);
    for (;;) {
        uint64_t now = now_ns();
        if (option.seconds > 0 && now >= end_ns)
            stopping = true;
        if (!under_way && !may_start())
            return;
        if (stopping && now >= end_ns + DRAIN_SECONDS * 1000000000ull)
            return;
        int wait_ms = -1;
        if (option.seconds > 0) {
            uint64_t until = stopping ? end_ns + DRAIN_SECONDS * 1000000000ull : end_ns;
            wait_ms = (int)((until - now) / 1000000) + 1;
        }
        if (queue_length && (wait_ms < 0 || wait_ms > RETRY_MS))
            wait_ms = RETRY_MS;
        int count = epoll_wait(epoll_fd, events, EVENTS, wait_ms);
        if (count < 0 && errno != EINTR)
            die("epoll_wait: %s", strerror(errno));
        for (int i = 0; i < count; i++) {
            struct client *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT && !send_pending(c) && c->fd < 0)
                continue;
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                receive(c, events[i].events & EPOLLHUP);
        }
        serve_queue();
    }
}

static void read_request(const char *path)
{
    FILE *file = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!file)
        die("%s: %s", path, strerror(errno));
    char *json = NULL;
    size_t length = 0, capacity = 0;
    do {
        if (capacity - length < 65536) {
            capacity = capacity * 2 + 65536;
            json = realloc(json, capacity);
            if (!json)
                die("out of memory");
        }
        length += fread(json + length, 1, capacity - length, file);
    } while (!feof(file) && !ferror(file));
    if (ferror(file) || length == 0)
        die("%s: nothing to send", path);
    size_t head = option.framed ? 4 : 0;
    message_bytes = head + length;
    output = allocate(option.pipeline, message_bytes);
    for (unsigned i = 0; i < option.pipeline; i++) {
        char *frame = output + i * message_bytes;
        for (size_t byte = 0; byte < head; byte++)
            frame[byte] = (char)(length >> (8 * (3 - byte)));
        memcpy(frame + head, json, length);
    }
    free(json);
}

static double number(const char *name, const char *text, double least)
{
    char *end;
    double value = strtod(text, &end);
    if (*end || end == text || !(value >= least) || value > 1e9)
        die("--%s %s: a number from %g on is wanted", name, text, least);
    return value;
}

static void print_report(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                 (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    double seconds = (double)(last_answer_ns - begin_ns) / 1e9;
    printf("{\"calls\": %llu, \"errors\": %llu, \"unanswered\": %llu, \"seconds\": %.6f, "
           "\"calls_per_second\": %.1f, \"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, "
           "\"p999_us\": %.1f, \"max_us\": %.1f, \"load_cpu_seconds\": %.6f, "
           "\"backlog_full\": %llu, \"reconnects\": %llu}\n",
           (unsigned long long)answered, (unsigned long long)errors,
           (unsigned long long)under_way, seconds, seconds > 0 ? (double)answered / seconds : 0.0,
           percentile_us(0.5), percentile_us(0.9), percentile_us(0.99), percentile_us(0.999),
           (double)max_ns / 1e3, cpu, (unsigned long long)backlog_full,
           (unsigned long long)reconnects);
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        {"socket", required_argument, NULL, 's'},   {"clients", required_argument, NULL, 'c'},
        {"seconds", required_argument, NULL, 't'},  {"calls", required_argument, NULL, 'm'},
        {"form", required_argument, NULL, 'f'},     {"pipeline", required_argument, NULL, 'k'},
        {"request", required_argument, NULL, 'r'},  {"shutdown", no_argument, NULL, 'w'},
        {NULL, 0, NULL, 0},
    };
    const char *request = NULL, *form = "";
    int choice;
    while ((choice = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (choice) {
        case 's': option.socket_path = optarg; break;
        case 'c': option.clients = (unsigned)number("clients", optarg, 1); break;
        case 't': option.seconds = number("seconds", optarg, 0); break;
        case 'm': option.calls = (uint64_t)number("calls", optarg, 1); break;
        case 'f': form = optarg; break;
        case 'k': option.pipeline = (unsigned)number("pipeline", optarg, 1); break;
        case 'r': request = optarg; break;
        case 'w': option.shutdown = true; break;
        default: return 2;
        }
    }
    option.framed = !strcmp(form, "framed");
    option.http = !strcmp(form, "http");
    if (!option.framed && !option.http && strcmp(form, "oneshot"))
        die("--form oneshot, framed or http is wanted");
    if (!option.socket_path || !request || optind != argc)
        die("--socket PATH and --request FILE are wanted, and nothing besides options");
    if (!(option.seconds > 0) && !option.calls)
        die("--seconds or --calls is wanted, or the run would never end");
    if (!option.framed && option.pipeline != 1)
        die("--pipeline goes with --form framed only");
    if (strlen(option.socket_path) >= sizeof address.sun_path)
        die("%s: longer than a socket address can be", option.socket_path);
    address.sun_family = AF_UNIX;
    strcpy(address.sun_path, option.socket_path);
    read_request(request);

    struct rlimit descriptors;
    if (!getrlimit(RLIMIT_NOFILE, &descriptors)) {
        descriptors.rlim_cur = descriptors.rlim_max; /* one for each client */
        setrlimit(RLIMIT_NOFILE, &descriptors);
    }
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        die("epoll_create1: %s", strerror(errno));
    struct client *clients = allocate(option.clients, sizeof *clients);
    queue = allocate(option.clients, sizeof *queue);
    for (unsigned i = 0; i < option.clients; i++) {
        clients[i].fd = -1;
        clients[i].started = allocate(option.pipeline, sizeof *clients[i].started);
        clients[i].in_capacity = RECEIVE_BYTES;
        clients[i].in = allocate(1, RECEIVE_BYTES);
    }
    run(clients);
    print_report();
    return errors || under_way ? 1 : 0;
}
