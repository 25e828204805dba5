package CPANBridge;

use 5.010;
use strict;
use warnings;

use Carp qw(croak);
use CPANBridge::Clock;
use CPANBridge::Error;
use CPANBridge::Exchange;
use CPANBridge::JSON;
use CPANBridge::SocketPath;
use Scalar::Util qw(blessed looks_like_number);

our $VERSION = '0.6.0';

use constant MAX_CALLER => 200;

use constant DEFAULTS => (
    timeout       => 60,
    debug         => 0,
    retry_count   => 3,
    max_json_size => 10 * 1024 * 1024,
);

sub new {
    my ($class, @options) = @_;
    $class = ref $class || $class;
    my %setters = (
        timeout       => \&set_timeout,
        debug         => \&set_debug,
        retry_count   => \&set_retry_count,
        max_json_size => \&set_max_json_size,
        socket        => \&_set_socket,
    );
    my $self = bless { _state => { traffic => { sent => 0, received => 0 } }, _stats => _no_calls() }, $class;
    if ($class ne __PACKAGE__ && scalar(caller)->isa(__PACKAGE__)) {
        @options = _inherited(\%setters, @options);
    }
    croak 'CPANBridge->new takes names and values' if @options % 2;
    my %options = (DEFAULTS, @options);
    for my $name (sort keys %options) {
        my $set = $setters{$name}
            or croak "Unknown option '$name'; allowed are: " . join ', ', sort keys %setters;
        $set->($self, $options{$name});
    }
    return $self;
}

# Of what a subclass was given and hands on, the options of the bridge. The rest is its own. As with the first client,
# one that is not set, or has no time or size in it, has its default.
sub _inherited {
    my ($setters, @options) = @_;
    push @options, undef if @options % 2;
    my %options = @options;
    return map { $_ => $options{$_} }
        grep { $options{$_} || ($_ eq 'retry_count' && defined $options{$_} && $options{$_} ne '') }
        grep { exists $options{$_} } keys %{$setters};
}

sub set_timeout {
    my ($self, $seconds) = ($_[0], _plain($_[1]));
    croak 'timeout must be a number of seconds above 0 and at most 1e9'
        if !_is_number($seconds) || $seconds <= 0 || $seconds > 1e9;
    $self->{timeout} = $seconds + 0;
    return $self;
}

sub set_debug {
    my ($self, $on) = @_;
    $self->{debug} = $on ? 1 : 0;
    return $self;
}

sub set_retry_count {
    my ($self, $count) = ($_[0], _plain($_[1]));
    croak 'retry_count must be a whole number, 0 or more'
        if !_is_number($count) || $count !~ /\A[0-9]+\z/;
    $self->{retry_count} = $count + 0;
    return $self;
}

sub set_max_json_size {
    my ($self, $bytes) = ($_[0], _plain($_[1]));
    croak 'max_json_size must be a whole number of bytes above 0'
        if !_is_number($bytes) || $bytes !~ /\A[1-9][0-9]*\z/;
    $self->{max_json_size} = $bytes + 0;
    return $self;
}

sub _set_socket {
    my ($self, $path) = @_;
    croak 'socket must be a path' if defined $path && (ref $path || $path eq '');
    $self->{socket} = $path;
    return $self;
}

# Under `use bignum` and the like, all numbers of a script are objects; and their own conversion to plain ones loses
# fractions there.
sub _plain {
    my ($value) = @_;
    local $@;
    my $json = blessed $value ? eval { local $SIG{__DIE__}; CPANBridge::JSON::encode($value) } : undef;
    return defined $json && $json =~ /\A-?[0-9]/ ? 0 + $json : $value;
}

sub _is_number {
    my ($value) = @_;
    return defined $value && !ref $value && looks_like_number($value) && $value == $value;
}

sub call_python {
    my ($self, $module, $function, $params) = @_;
    my $call = { module => $module, function => $function, params => $params };
    _run($self, $call);
    return $call->{outcome}{success} ? $call->{outcome}{result} : _outcome($call);
}

sub call {
    my ($self, $module, $function, $params) = @_;
    my $call = { module => $module, function => $function, params => $params };
    _run($self, $call);
    return $call->{outcome}{result} if $call->{outcome}{success};
    return _error($call)->throw;
}

sub call_outcome {
    my ($self, $module, $function, $params) = @_;
    my $call = { module => $module, function => $function, params => $params };
    _run($self, $call);
    return _outcome($call);
}

sub call_many {
    my ($self, $calls) = @_;
    croak 'call_many takes a reference to an array of [module, function, params]'
        if ref $calls ne 'ARRAY' || grep { ref ne 'ARRAY' } @{$calls};
    my @calls = map { { module => $_->[0], function => $_->[1], params => $_->[2] } } @{$calls};
    _run($self, @calls);
    my @results = map { $_->{outcome}{success} ? $_->{outcome}{result} : _outcome($_) } @calls;
    return wantarray ? @results : \@results;
}

# Runs the calls in one exchange, which sets their outcomes.
sub _run {
    my ($self, @calls) = @_;
    if (!ref $self) {
        my ($method) = (caller 1)[3] =~ /([^:]+)\z/;
        croak "$method is an object method: use CPANBridge->new";
    }
    local $!;
    my $caller = $self->perl_caller;
    $caller = substr $caller, -MAX_CALLER() if defined $caller && length $caller > MAX_CALLER;
    CPANBridge::Exchange->new($self, $caller)->run(@calls);
    for my $call (@calls) {
        _count($self, $call);
        $self->call_finished($call);
    }
    return;
}

sub _outcome {
    my ($call) = @_;
    my %outcome = (%{ $call->{outcome} }, map { $_ => $call->{$_} } qw(module function duration));
    $outcome{request_id} = $call->{request_id} if defined $call->{request_id};
    return \%outcome;
}

sub _error {
    my ($call) = @_;
    my %fields = %{ _outcome($call) };
    delete $fields{success};
    return CPANBridge::Error->new(%fields, message => delete $fields{error});
}

sub _no_calls {
    return { total_calls => 0, successful_calls => 0, failed_calls => 0, total_time => 0 };
}

sub _count {
    my ($self, $call) = @_;
    my ($stats, $duration, $success) = ($self->{_stats}, $call->{duration}, $call->{outcome}{success});
    $stats->{total_calls}++;
    $stats->{ $success ? 'successful_calls' : 'failed_calls' }++;
    $stats->{total_time} += $duration;
    $stats->{min_time} = $duration if !defined $stats->{min_time} || $duration < $stats->{min_time};
    $stats->{max_time} = $duration if !defined $stats->{max_time} || $duration > $stats->{max_time};
    $self->{_last_error} = $success ? undef : _error($call);
    return;
}

sub get_last_error { return $_[0]{_last_error} }

sub get_performance_stats {
    my ($self) = @_;
    my ($stats, $state) = @{$self}{qw(_stats _state)};
    my $count   = $stats->{total_calls};
    my $traffic = $state->{traffic};
    return {
        %{$stats},
        min_time     => $stats->{min_time} || 0,
        max_time     => $stats->{max_time} || 0,
        average_time => $count ? $stats->{total_time} / $count : 0,
        success_rate => $count ? 100 * $stats->{successful_calls} / $count : 0,
        (map { $_ => $state->{$_} || 0 } qw(retries reconnects)),
        bytes_sent     => $traffic->{sent},
        bytes_received => $traffic->{received},
    };
}

sub test_python_bridge {
    my ($self) = @_;
    my $call = { module => 'test', function => 'ping', params => undef };
    _run($self, $call);
    my $result = $call->{outcome}{result};
    return ref $result eq 'HASH' && defined $result->{message} && $result->{message} eq 'pong' ? 1 : 0;
}

sub disconnect {
    my ($self) = @_;
    local $!;
    my $connection = delete $self->{_state}{connection};
    $connection->close if $connection;
    return;
}

# Subclasses that were written for the first client call these two. There is nothing to destroy: Perl closes
# the connection.
sub DESTROY { }

sub _safe_json_encode {
    my ($self, $data) = @_;
    my $previous_error = $@;
    my $json = eval { local $SIG{__DIE__}; CPANBridge::JSON::encode($data, '$data') };
    croak "JSON encoding failed: $@" if !defined $json;
    $@ = $previous_error;
    return $json;
}

# What follows may be overridden.

sub socket_paths {
    my ($self) = @_;
    return defined $self->{socket} ? $self->{socket} : CPANBridge::SocketPath::candidates();
}

sub perl_caller {
    my $level = 0;
    my $package;
    do { $package = caller $level++ }
        while (defined $package && ($package eq 'CPANBridge' || $package->isa('CPANBridge')));
    return $0 if !defined $package;
    my $place = join ':', (caller $level - 1)[ 1, 2 ];
    # The next outer frame has the name of the sub that contains the call.
    while (my $sub = (caller $level++)[3]) {
        return $sub =~ /::__ANON__\z/ ? $place : $sub if $sub ne '(eval)';
    }
    return $place;
}

sub call_finished {
    my ($self, $call) = @_;
    return if !$self->{debug};
    my $name = join '.', map { defined $_ ? $_ : '?' } @{$call}{qw(module function)};
    my $outcome = $call->{outcome};
    $name =~ s/([^ -~])/sprintf '\\x{%x}', ord $1/ge;
    $self->debug_line(sprintf '%s %.1f ms %s',
        $name, 1000 * $call->{duration}, $outcome->{success} ? 'ok' : $outcome->{error_type});
    return;
}

sub debug_line {
    my ($self, $line) = @_;
    local ($\, $,);
    print {*STDERR} "CPANBridge: $line\n";
    return;
}

1;

__END__

=encoding utf-8

=head1 NAME

CPANBridge - call Python functions from Perl

=head1 SYNOPSIS

    use CPANBridge;

    my $bridge = CPANBridge->new(timeout => 10);

    my $mean = $bridge->call_python('stats', 'mean', [ [ 1, 2, 3, 4 ] ]);
    if (ref $mean eq 'HASH' && defined $mean->{success} && !$mean->{success}) {
        warn "No mean: $mean->{error}";
    }

    # The same with an exception instead of a hash to check:
    my $again = eval { $bridge->call('stats', 'mean', [ [ 1, 2, 3, 4 ] ]) };
    warn "No mean: $@" if $@;

    my @results = $bridge->call_many([ map { [ 'files', 'digest', { path => $_ } ] } @paths ]);

=head1 DESCRIPTION

The daemon C<cpanbridged> runs Python functions for Perl scripts. This is its client library:
pure Perl, with no modules other than those of Perl 5.10. A call costs well under a millisecond. Python
modules stay loaded from one call to the next.

The daemon runs several worker processes. Whether a call finds what earlier ones left in a module (open
connections, parsed documents) is set in the daemon's configuration, by the module's C<affinity>:

=over

=item client

Later calls of this process find what its earlier ones have left, over any connection (in a container whose
processes the daemon cannot see, over the same one). A process that the script forks is another client,
and does not find it.

=item module

All clients find what any client has left.

=item none

A call may run in any worker: keep state outside, in a file or a database.

=back

Such state ends with its worker. State of one client process also ends when that process ends or has been silent for
long. A call that comes too late for it gets C<SessionLost>, see L</ERRORS>.

An object keeps one connection to the daemon. It opens it with the first call, and again when the
daemon was restarted, when the daemon has closed it because it was idle for long, or when the script has forked. The
script has to do nothing for that.

=head1 METHODS

=head2 new(%options)

Creates a bridge; does not connect yet. Dies if an option is unknown or has an impossible value.

=over

=item timeout

How long a call may take, in seconds, from connecting to the last byte of the reply. Above 0 and at most
1e9; fractions are fine. 60 by default. The daemon gets it with each request, and says when it is over whether the call has
run; that reply is waited for a little longer, by a quarter of the timeout, but at least 0.25 and at most 1 s.

=item retry_count

How many times to try again if no daemon listens. 3 by default, which takes about a second in all:
a daemon that is restarted does not listen for a moment. After such a second without success, calls of the next
five seconds try once and fail at once. A call that may have run is never repeated.

=item max_json_size

How many bytes a request, and a reply, may have. 10485760 (10 MiB) by default.

=item socket

The path of the daemon's socket. See L<CPANBridge::SocketPath> for the default paths.
Scripts that run with taint checks (C<perl -T>) should set it: a path from the environment is tainted.

=item debug

With a true value, one line for each call goes to STDERR: its name, its duration, its outcome.
Parameters and results are never written.

=back

=head2 call_python($module, $function, $params)

Calls the function and returns its result. If C<$params> is a reference to a hash, the function gets
keyword arguments; to an array: positional ones; with undef none; and anything else is its one argument.

If the call fails, this returns a reference to a hash of C<success> (0), C<error>,
C<error_type>, C<module>, C<function>, C<duration> in seconds, and if they exist: C<request_id>,
C<traceback> (where the daemon runs with C<debug> on), C<retry_after> (seconds, where the daemon can tell: with C<Overloaded>). See
L</ERRORS>. It never dies because a call failed.

A call waits its turn while the daemon has no room for it: while all requests that may run at once are running, while the
requests of a minute are used up (C<limits.max_requests_per_minute>, 2000 by default, of all clients together), and while the
daemon uses more memory or CPU than it may. So a call that takes a millisecond may have its reply after up to a minute, or later
where many wait. It waits for as long as the C<timeout> allows, and is not run if that is over before: then the C<error_type> is
C<RequestTimeout>, and C<error> names the limit, as in C<The call was not run: it waited 5.0 s for
limits.max_requests_per_minute>. Such a call may be repeated. A daemon that lets calls wait is alive: C<test_python_bridge>
is answered meanwhile.

=head2 call($module, $function, $params)

The same, but dies with a L<CPANBridge::Error> if the call fails. So a result that has the fields
of a failure cannot be mistaken for one.

=head2 call_outcome($module, $function, $params)

The same, but always returns a reference to a hash: of C<success> (1), C<result>, C<module>, C<function>, C<duration> and
C<request_id> if the call succeeds, else as C<call_python>. This is what C<call_python> of the first client returned.

=head2 call_many([ [$module, $function, $params], ... ])

Runs many calls, without waiting for one reply before the next request is sent. Returns a list of what
C<call_python> would return, in the order of the calls; in scalar context, a reference to it. The
timeout is for all of them together. A failed call does not prevent the others from running. If a
connection is lost, calls that may have run fail with C<WorkerLost> (up to 128 are in flight at a
time), and all others continue over a new one.

One reply over C<max_json_size> ends the connection as well: that call fails with C<ReplyTooLarge>, and
those that were sent with it and have no reply yet fail with C<WorkerLost>, though the worker lives; their
messages name the call that was the cause.

Larger batches than the daemon takes in a minute have to wait (see C<call_python>): set a C<timeout> that is long
enough, or raise the limit.

=head2 get_last_error

The L<CPANBridge::Error> of the last call (of C<call_many>: of its last call); undef if that
succeeded. As a string it is the message.

=head2 get_performance_stats

A reference to a hash of C<total_calls>, C<successful_calls>, C<failed_calls>, C<success_rate> (in
percent), C<total_time>, C<average_time>, C<min_time>, C<max_time> (in seconds; calls of C<call_many>
overlap, and count from when each was sent), C<retries> (attempts to connect after the first, and requests
sent again), C<reconnects>, C<bytes_sent> and C<bytes_received>.

=head2 set_timeout, set_debug, set_retry_count, set_max_json_size

Change an option. They die if the value is impossible, and return the object.

=head2 test_python_bridge

True if the daemon answers.

=head2 disconnect

Closes the connection. The next call opens another.

=head1 SUBCLASSES

A subclass may call C<< $class->SUPER::new(%options) >> with all that it was given itself: options that are not of the
list above are its own, and one of the list that is undef, empty or 0 has its default (but 0 for C<retry_count> is 0). So a
mistyped option of a subclass is found only if the subclass looks for it. It may keep
fields of its own in the object, which is a hash; names that begin with an underscore, and those of
the options, are taken.

Subclasses that were written for the first client (1.x, 2.x) expect C<call_python> to return a hash of C<success> and
C<result>. One line in each makes that so:

    sub call_python { my ($self, @call) = @_; return $self->call_outcome(@call) }

They also find C<_safe_json_encode($data)>, which returns JSON, and dies if there is none for the data, and a C<DESTROY>, which
does nothing.

These methods may be overridden:

=over

=item socket_paths

The paths where the daemon may listen; the first that exists is used. An entry may also be one
of C<candidates> in L<CPANBridge::SocketPath>. Called before each attempt to connect.

=item perl_caller

The caller, for the daemon's log, which has it with security events and calls that take too long; the
last 200 characters are sent. By default the sub that contains the call (as C<Package::name>), or the script
and line. Frames of subclasses are skipped.

=item call_finished($call)

Called after each call, with a hash of C<module>, C<function>, C<params>, C<duration>, C<request_id> and
C<outcome> (C<success>, and C<result> or C<error> and C<error_type>). By default writes the
debug line.

=item debug_line($line)

Writes a debug line to STDERR.

=back

=head1 DATA

No value is ever altered: a value that cannot be sent is refused, and the message names its place, such as
C<< $params->{rows}[3] >>. So is a result that cannot arrive as it was (C<UnencodableResult>): infinity and NaN, two keys of a
dict that are the same as strings (C<1> and C<"1">), and objects other than dates, decimals and the like. (An operator can let a
module send them all the same, with C<results = "lenient">.)

=over

=item Strings

are characters, in both directions, and all of Unicode. A string of bytes is sent as the characters
U+0000 to U+00FF. Decode text before you send it, and C<use utf8> for literals; otherwise the function gets C<Ã¼> for C<ü>. Half
of a surrogate pair is refused.

=item Numbers

stay numbers and strings stay strings: C<"007"> and C<"1.0"> arrive as such. What counts is how the value
was made, not how it was used; before Perl 5.36, a number that was printed counts as a string, and only
C<< $value + 0 >> is certain to be a number. A float that is a whole number is sent as an integer up to 2**53 (9007199254740992); one above
that as Perl prints it, mostly with an exponent, and arrives as a float. Infinity and NaN are
refused. A whole number beyond Perl's own arrives as a L<Math::BigInt>.

=item Exact numbers

Objects of L<Math::BigInt>, L<Math::BigFloat> and L<Math::BigRat>, and so all numbers under C<use bigint>, C<use bignum> and
C<use bigrat>, are sent as numbers: whole ones of up to 4300 digits as integers, others as decimal numbers, which arrive as floats.
One that no float shows exactly, such as C<1/3> or one of 20 digits after the point, is refused, as are infinity and NaN: round
it first (15 digits always fit), or send it as a string.

=item undef

is null, or None.

=item Booleans

arrive as L<CPANBridge::Boolean>, or as JSON::PP::Boolean where that module is used. Sent as booleans
are these, C<\1> and C<\0>, booleans of L<Types::Serialiser>, and from Perl 5.36 on C<!!1>.

=item Hashes and arrays

may be nested, as deep as the daemon allows. One that contains itself is refused.

=item Objects

are sent as the result of their method C<TO_JSON>. If that dies, the call fails with C<InvalidParams>, whatever
the exception: also with that of a signal handler that ran meanwhile. Other objects are refused, as are code, globs and
references to scalars.

=back

=head1 ERRORS

Messages are character strings, like all other strings: before you print one, C<binmode STDERR, ':utf8'>.

An exception of the function has the name of its Python class for C<error_type>, such as
C<ValueError>. Others come from the daemon:

=over

=item InvalidRequest, InvalidParams, ModuleNotAllowed, FunctionNotAllowed

The call is wrong, or not allowed. The bridge itself uses the first two for values that it cannot send.

=item UnencodableResult

The function B<has run>, but its result cannot be sent as it is; the message has the place, such as
C<result.rows[3].price is nan>.

=item PermissionDenied

The user may not make this call: C<system.cleanup> and C<system.shutdown> are for the daemon's own user and
root. Not run.

=item Overloaded

Rejected, because there was no room; C<retry_after> has the seconds to wait. Not run. A daemon rejects calls only
if it is set to C<overload = "reject">, or if no further client can have state in it; else calls wait.

=item ShuttingDown

The daemon is stopping. Not run.

=item SessionLost

What earlier calls of this process left in the daemon, such as handles, is gone: the worker that had it has
ended, or the script was silent for too long. Not run. Reported once; start afresh.

=back

or from the bridge:

=over

=item DaemonNotRunning

No daemon listens, or the user has no right to connect ("Permission denied"). The message has each path that
was tried, the reason why it failed, and the remedy: start the daemon, or ask its operator for access (its settings
C<socket_mode> and C<socket_group>).

=item ConnectionFailed

The system gives the script no further socket.

=item RequestTimeout

No reply in time; the call may have run, or may still run, unless the message says that it was not run or not sent. The
request has the time that the script waits, and the daemon gives up then as well. If the daemon allows less (C<limits.request_timeout>,
or the module's own), the daemon reports this error.

=item WorkerLost

The connection ended before the reply: mostly because the worker died, but see C<call_many> for another
cause. The call may have run; the script has to decide whether it may
be repeated. If the daemon itself reports this error, as its message says, the call was not run.

=item ReplyTooLarge

The call has run, but its reply is over C<max_json_size>.

=item InvalidReply

The received data is not a reply to the call, which may have run; or another program than cpanbridged listens there.

=back

=head1 SIGNALS

No signal handler is installed or replaced, and C<alarm> is not used. A signal doesn't shorten a call.
A handler may die: that ends the call and reaches the script, and the object can be used again. A daemon
that closes the connection causes no C<SIGPIPE>.

=head1 THE END OF A SCRIPT

Calls may also be made by a C<DESTROY> that runs in Perl's global destruction: they are sent as at any other time. But by then
Perl itself may have made undef of what the script's variables referred to, if it was an object (a L<Math::BigInt>, a boolean, another
bridge). Strings and numbers stay. Objects that have a last call to make are best let go of before the script's end.

=head1 ENVIRONMENT

=over

=item CPAN_BRIDGE_SOCKET

Where the daemon listens: one path, or several separated by commas, each of which is tried.

=item CPAN_BRIDGE_JSON

C<pp>: decode replies in Perl alone. See L<CPANBridge::JSON>.

=back

=head1 SEE ALSO

L<CPANBridge::Error>, L<CPANBridge::SocketPath>

=head1 LICENSE

MIT

=cut
