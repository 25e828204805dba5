package CPANBridge::Connection;

# A framed connection: sends and receives bytes, and knows how it ended. It does not interpret them.

use 5.010;
use strict;
use warnings;

use CPANBridge::Clock;
use CPANBridge::Error;
use Errno qw(EAGAIN EWOULDBLOCK EINTR EINPROGRESS EISCONN ENOENT ENOTDIR ECONNREFUSED EACCES);
use Fcntl qw(F_GETFD F_SETFD F_GETFL F_SETFL FD_CLOEXEC O_NONBLOCK);
use Socket qw(PF_UNIX SOCK_STREAM sockaddr_un);

our $VERSION = '0.6.0';

use constant MAX_PATH   => 107;
use constant SEND_SIZE  => 64 * 1024;
use constant READ_SIZE  => 64 * 1024;
use constant BACKLOG_PAUSE => 0.02;

# With this flag, if the system has it, sending to a closed connection fails without a signal to the script.
use constant NO_SIGNAL => scalar eval { local $SIG{__DIE__}; Socket::MSG_NOSIGNAL() };

# Connects to the first path of `candidates` that exists, or that answers if they were set. Dies with a
# CPANBridge::Error of type DaemonNotRunning, RequestTimeout or ConnectionFailed; `worth_retrying` is set in the
# first if the cause may be a daemon that is being restarted. `traffic` is a hash of the bytes `sent` and
# `received`, to which the connection adds its own.
sub open {
    my ($class, $candidates, $deadline, $traffic) = @_;
    my (@reasons, $worth_retrying, $is_forbidden);
    for my $candidate (@{$candidates}) {
        my ($path, $problem, $is_set) = @{$candidate};
        my $is_there;
        $problem = 'its path is too long for a socket' if !defined $problem && length $path > MAX_PATH;
        if (!defined $problem) {
            my ($handle, $errno) = _connect($path, $deadline);
            return $class->_new($handle, $path, $traffic) if $handle;
            $worth_retrying ||= $errno == ENOENT || $errno == ECONNREFUSED;
            $is_forbidden   ||= $errno == EACCES;
            $is_there = $errno != ENOENT && $errno != ENOTDIR;
            local $! = $errno;
            $problem = "$!";
        }
        push @reasons, "$path: $problem";
        last if $is_there && !$is_set;
    }
    die CPANBridge::Error->new(
        error_type     => 'DaemonNotRunning',
        worth_retrying => $worth_retrying,
        message        => 'The daemon is not running or cannot be reached ('
            . join('; ', @reasons)
            . ')'
            . _advice($worth_retrying, $is_forbidden),
    );
}

# The remedy, by the reasons.
sub _advice {
    my ($is_absent, $is_forbidden) = @_;
    my $ask = "ask the daemon's operator for access (socket_mode, socket_group)";
    return ". \u$ask, or start one with: cpanbridged start" if $is_absent && $is_forbidden;
    return ". \u$ask"                         if $is_forbidden;
    return '. Start it with: cpanbridged start' if $is_absent;
    return '';
}

sub _new {
    my ($class, $handle, $path, $traffic) = @_;
    return bless {
        handle  => $handle,
        set     => CPANBridge::Clock::handle_set($handle),
        traffic => $traffic,
        path    => $path,
        owner   => _owner(),
        unsent  => '',
        unread  => '',
        queued  => 0,    # bytes of all requests so far
        written => 0,    # how many of them the system has accepted
        broken  => 0,    # whether the daemon has closed its side for reading
        missing => 0,    # bytes of a reply that has begun to arrive
        end     => undef,
    }, $class;
}

# A handle; or undef and the number of the system's error.
sub _connect {
    my ($path, $deadline) = @_;
    socket my $handle, PF_UNIX, SOCK_STREAM, 0
        or die CPANBridge::Error->new(error_type => 'ConnectionFailed', message => "No socket: $!");
    binmode $handle;    # overrides -C and PERL_UNICODE
    fcntl $handle, F_SETFD, fcntl($handle, F_GETFD, 0) | FD_CLOEXEC;
    fcntl $handle, F_SETFL, fcntl($handle, F_GETFL, 0) | O_NONBLOCK;
    my $address = sockaddr_un($path);
    while (1) {
        return $handle if connect $handle, $address;
        return $handle if $! == EISCONN;
        next if $! == EINTR;
        # connect on a non-blocking Unix socket does not wait for a full backlog: it has to be repeated.
        return (undef, $! + 0) if $! != EAGAIN && $! != EWOULDBLOCK && $! != EINPROGRESS;
        my $now = CPANBridge::Clock::now();
        if ($now >= $deadline) {
            die CPANBridge::Error->new(
                error_type => 'RequestTimeout',
                message    => "The daemon at $path is too busy to take a further connection",
            );
        }
        my $next = $now + BACKLOG_PAUSE;
        CPANBridge::Clock::pause_until($next < $deadline ? $next : $deadline);
    }
}

# The process and the thread: a new process or thread gets copies of all connections of its parent.
sub _owner { return $INC{'threads.pm'} ? $$ . '/' . threads->tid : $$ }

sub is_own { return $_[0]{owner} eq _owner() }

# Whether an idle connection can take a request: the daemon has neither closed it nor sent
# anything. Returns at once.
sub is_usable {
    my ($self) = @_;
    return 0 if defined $self->{end} || $self->{unread} ne '' || $self->{unsent} ne '';
    $self->receive;
    return !defined $self->{end} && $self->{unread} eq '';
}

# Adds a request; returns the value of `written` from which on the daemon may have all of it.
sub enqueue {
    my ($self, $body) = @_;
    $self->{unsent} .= pack('N', length $body) . $body;
    return $self->{queued} += 4 + length $body;
}

# What could not be sent yet is not sent at all; a request that is cut off by that ends the connection's use.
sub stop_sending {
    my ($self) = @_;
    $self->{broken} = 1 if $self->{unsent} ne '';
    $self->{unsent} = '';
    return;
}

sub unsent_bytes  { return length $_[0]{unsent} }
sub written_bytes { return $_[0]{written} }

# How it ended: 'drained' (the daemon has sent that it reads no further request), 'closed' (it has not),
# or undef.
sub end { return $_[0]{end} }

# Sends what can be sent, and waits until bytes were received or sent. False when the deadline has passed.
sub transfer {
    my ($self, $deadline) = @_;
    return 0 if CPANBridge::Clock::now() >= $deadline;
    my $progress = $self->{unsent} ne '' && $self->_write;
    my $has_more = $self->{unsent} ne '';
    return 1 if $progress && $has_more;
    my ($readable, $writable) = CPANBridge::Clock::wait_for($self->{set}, $has_more, $deadline);
    $self->receive  if $readable;
    $self->_write if $writable;
    return $readable || $writable;
}

sub _write {
    my ($self) = @_;
    my $count;
    if (defined NO_SIGNAL) {
        $count = send $self->{handle}, substr($self->{unsent}, 0, SEND_SIZE), NO_SIGNAL;
    }
    else {
        local $SIG{PIPE} = 'IGNORE';
        $count = syswrite $self->{handle}, $self->{unsent}, SEND_SIZE;
    }
    if (defined $count) {
        $self->{written} += $count;
        $self->{traffic}{sent} += $count;
        substr $self->{unsent}, 0, $count, '';
        return $count;
    }
    return 0 if $! == EAGAIN || $! == EWOULDBLOCK || $! == EINTR;
    # The daemon has closed; what it sent before that can still be read.
    $self->{unsent} = '';
    $self->{broken} = 1;
    return 0;
}

# Reads what is there; returns at once.
sub receive {
    my ($self) = @_;
    my $want = $self->{missing} > READ_SIZE ? 1 << 20 : READ_SIZE;
    my $count = sysread $self->{handle}, $self->{unread}, $want, length $self->{unread};
    if ($count) {
        $self->{traffic}{received} += $count;
    }
    elsif (defined $count || ($! != EAGAIN && $! != EWOULDBLOCK && $! != EINTR)) {
        $self->{end} = 'closed';
    }
    return;
}

# Whether requests can still be added.
sub takes_requests { return !defined $_[0]{end} && !$_[0]{broken} }

# The body of the next complete reply, or undef. Dies with a CPANBridge::Error of type
# ReplyTooLarge, or InvalidReply if it begins with text: a length like that is above 500 MB.
sub next_reply {
    my ($self, $limit) = @_;
    return undef if length $self->{unread} < 4;
    my $length = unpack 'N', $self->{unread};
    if ($length == 0) {
        $self->{end} = 'drained';
        return undef;
    }
    if ($length > $limit) {
        if ($self->{unread} =~ /\A([ -~]{4})/) {
            die CPANBridge::Error->new(
                error_type => 'InvalidReply',
                message    => "The reply from $self->{path} begins with '$1', not with a length: not a cpanbridged?",
            );
        }
        die CPANBridge::Error->new(
            error_type => 'ReplyTooLarge',
            message    => "The reply has $length bytes; at most $limit are allowed (max_json_size)",
        );
    }
    $self->{missing} = 4 + $length - length $self->{unread};
    return undef if $self->{missing} > 0;
    my $body = substr $self->{unread}, 4, $length;
    substr $self->{unread}, 0, 4 + $length, '';
    return $body;
}

# Closes this process's copy. Never shutdown: after a fork the other copy is in use.
sub close {
    my ($self) = @_;
    CORE::close $self->{handle};
    return;
}

1;

__END__

=head1 NAME

CPANBridge::Connection - a framed connection to the daemon

=head1 DESCRIPTION

Messages are a length of 4 bytes, big-endian, and so many bytes. A message of length 0 from the
daemon means that no further request on this connection was or will be read.

=head1 METHODS

=over

=item open($candidates, $deadline, $traffic)

Connects. See L<CPANBridge::SocketPath> for the candidates. The bytes sent and received are added to
C<sent> and C<received> of the hash C<$traffic>.

=item is_own

Whether this process (and thread) opened it.

=item is_usable

Whether a connection that was idle for a while can take a request.

=item takes_requests

Whether requests may be added.

=item enqueue($body)

Adds a request. Returns a count of bytes; the request is out when C<written_bytes> has reached it.

=item transfer($deadline)

Sends and receives what is possible.

=item stop_sending

Drops what was not sent yet.

=item receive

Reads what is there, without waiting.

=item next_reply($limit)

The body of the next reply.

=item end

C<drained>, C<closed>, or undef while it is open.

=item unsent_bytes, written_bytes

The bytes that are still to be written, and those that were written.

=item close

Closes it.

=back

=cut
