package CPANBridge::Exchange;

# A batch of calls (one or many), from the first connection to the last reply. When a connection ends, a
# call is sent again only if the daemon cannot have run it: the daemon has said so, or did not get the whole
# request. Any other call is never sent again.

use 5.010;
use strict;
use warnings;

use CPANBridge::Clock;
use CPANBridge::Connection;
use CPANBridge::Error;
use CPANBridge::JSON;
use Time::HiRes ();

our $VERSION = '0.6.0';

# The most calls in flight, so that a lost worker leaves the outcome of few unknown; and the most bytes that
# wait to be sent, so that a large batch is not held in memory twice.
use constant WINDOW       => 128;
use constant UNSENT_BYTES => 256 * 1024;

# The largest first byte of a length that the daemon recognizes as one.
use constant MAX_REQUEST => 9 * 2**24 - 1;

# The beginning of the reply to a call that has succeeded.
use constant RESULT => '{"result":';

# How much longer than the timeout a reply is waited for, in seconds: a quarter of it, within these bounds. The daemon has
# the timeout from the request, and answers when it is over, with the reason.
use constant LEAST_GRACE => 0.25;
use constant MOST_GRACE  => 1;

# For so many seconds after all retries have found no daemon, calls try just once.
use constant ABSENT_SECONDS => 5;

my $requests = 0;

# It uses the bridge's options, `socket_paths`, and `_state`, which is kept between exchanges:
# connection, absent_until, the counts retries and reconnects, and the connections' traffic.
sub new {
    my ($class, $bridge, $perl_caller) = @_;
    my $now = CPANBridge::Clock::now();
    return bless {
        bridge      => $bridge,
        state       => $bridge->{_state},
        timeout     => $bridge->{timeout},
        perl_caller => $perl_caller,
        started     => $now,
        deadline    => $now + $bridge->{timeout},
        sent        => [],
        fruitless   => 0,
    }, $class;
}

# Runs the calls, each { module, function, params }. Returns when each has its outcome, either
# { success => 1, result => ... } or { success => 0, error => ..., error_type => ... }, and its duration.
sub run {
    my ($self, @calls) = @_;
    my $previous_error = $@;
    $self->{calls}   = [@calls];
    $self->{waiting} = \@calls;
    while (@{ $self->{waiting} }) {
        my $error;
        my $connection = $self->_connection(\$error);
        if (!$connection) {
            $self->_fail($_, $error) for splice @{ $self->{waiting} };
            last;
        }
        $self->_converse($connection);
    }
    $@ = $previous_error;
    return;
}

# The kept connection if the daemon still has it, or else a new one. It is removed from the state: if
# a signal handler dies while replies are outstanding, no later call finds it there and reads them.
sub _connection {
    my ($self, $error) = @_;
    my $state = $self->{state};
    if (my $kept = delete $state->{connection}) {
        return $kept if $kept->is_own && $kept->is_usable;
        $kept->close;
    }
    my $retries = CPANBridge::Clock::now() < ($state->{absent_until} || 0) ? 0 : $self->{bridge}{retry_count};
    my $attempt = 0;
    while (1) {
        my $connection = eval {
            local $SIG{__DIE__} if $SIG{__DIE__};
            CPANBridge::Connection->open($self->_candidates, $self->{deadline}, $state->{traffic});
        };
        if ($connection) {
            delete $state->{absent_until};
            $state->{reconnects}++ if $state->{connected}++;
            return $connection;
        }
        ${$error} = _own($@);
        return undef if !${$error}->{worth_retrying};
        last if $attempt >= $retries || CPANBridge::Clock::now() >= $self->{deadline};
        $self->_pause(++$attempt);
        $state->{retries}++;
    }
    $state->{absent_until} = CPANBridge::Clock::now() + ABSENT_SECONDS;
    return undef;
}

sub _candidates {
    my ($self) = @_;
    return [ map { ref $_ ? $_ : [$_] } $self->{bridge}->socket_paths ];
}

# 0.1, 0.3, 0.6 and from then on 1 second: a daemon that restarts does not listen for a moment.
sub _pause {
    my ($self, $attempt) = @_;
    my $seconds = $attempt < 4 ? 0.05 * $attempt * ($attempt + 1) : 1;
    my $moment = CPANBridge::Clock::now() + $seconds;
    CPANBridge::Clock::pause_until($moment < $self->{deadline} ? $moment : $self->{deadline});
    return;
}

# The evals here do not call the script's __DIE__ handler for the bridge's own errors. If there is none,
# which is nearly always so, nothing is localized: that costs more than the rest of an eval.

# An error that the bridge itself died with. An exception of a signal handler of the script is thrown on.
sub _own {
    my ($error) = @_;
    die $error if !CPANBridge::Error::is_internal($error);
    return $error;
}

# Sends what waits and receives the replies, until all have arrived or the connection has ended.
sub _converse {
    my ($self, $connection) = @_;
    my ($waiting, $sent) = @{$self}{qw(waiting sent)};
    my $finished = 0;
    while (@{$waiting} || @{$sent}) {
        $self->_send($connection) if @{$waiting} && @{$sent} <= WINDOW / 2;
        last if !@{$sent};
        if (!$connection->transfer($self->{deadline})) {
            $finished += $self->_wait_for_reasons($connection);
            last;
        }
        $finished += $self->_receive($connection);
        last if $self->{spoiled} || defined $connection->end;
    }
    my $state = $self->{state};
    if (delete $self->{spoiled} || defined $connection->end || @{$sent} || @{$waiting}) {
        $connection->close;
        $self->_settle($connection, $finished);
    }
    else {
        $state->{connection} = $connection;
    }
    return;
}

# The time is over. Nothing more is sent; calls that were sent get the daemon's own replies, if these are there (a
# signal handler may have taken long) or come soon. Returns how many came.
sub _wait_for_reasons {
    my ($self, $connection) = @_;
    my $sent  = $self->{sent};
    my $grace = $self->{timeout} / 4;
    $grace = LEAST_GRACE if $grace < LEAST_GRACE;
    $grace = MOST_GRACE  if $grace > MOST_GRACE;
    my $finished = 0;
    $connection->stop_sending;
    $connection->receive;
    while (1) {
        $finished += $self->_receive($connection);
        return $finished if $self->{spoiled} || defined $connection->end;
        last if !@{$sent} || $sent->[0]{sent_at} > $connection->written_bytes;
        last if !$connection->transfer($self->{deadline} + $grace);
    }
    $self->_time_out($connection) if @{$sent} || @{ $self->{waiting} };
    return $finished;
}

sub _send {
    my ($self, $connection) = @_;
    my ($waiting, $sent) = @{$self}{qw(waiting sent)};
    while (@{$waiting}
        && @{$sent} < WINDOW
        && $connection->unsent_bytes < UNSENT_BYTES
        && $connection->takes_requests)
    {
        my $call = shift @{$waiting};
        my $body = eval { local $SIG{__DIE__} if $SIG{__DIE__}; $self->_request($call) };
        if (!defined $body) {
            $self->_fail($call, _own($@));
            next;
        }
        $call->{sent_at} = $connection->enqueue($body);
        push @{$sent}, $call;
    }
    return;
}

# The request as JSON; dies with a CPANBridge::Error for one that can't be sent.
sub _request {
    my ($self, $call) = @_;
    my $now = CPANBridge::Clock::now();
    $call->{started} = $now if !defined $call->{started};
    $call->{request_id} = sprintf '%x-%x-%x', $$, time, ++$requests;
    for my $name (qw(module function)) {
        next if defined $call->{$name} && !ref $call->{$name} && $call->{$name} ne '';
        die CPANBridge::Error->new(error_type => 'InvalidRequest', message => "No $name is named");
    }
    my $left = $self->{deadline} - $now;
    # Times in microseconds: where a locale has decimal commas, no Perl puts one into a whole number.
    my $json = sprintf '{"module":%s,"function":%s,"request_id":"%s","perl_caller":%s,"client_version":"%s",'
        . '"timestamp":%.0fe-6,"timeout":%.0fe-6',
        _text($call->{module}, 'the module'), _text($call->{function}, 'the function'),
        $call->{request_id}, _text($self->{perl_caller}, 'perl_caller'), "CPANBridge.pm/$VERSION",
        1e6 * Time::HiRes::time(), 1e6 * ($left > 0.001 ? $left : 0.001);
    $json .= ',"params":' . CPANBridge::JSON::encode($call->{params}, '$params') if defined $call->{params};
    $json .= '}';
    my $limit = $self->{bridge}{max_json_size} < MAX_REQUEST ? $self->{bridge}{max_json_size} : MAX_REQUEST;
    if (length $json > $limit) {
        die CPANBridge::Error->new(
            error_type => 'InvalidRequest',
            message    => 'The request has ' . length($json) . " bytes; at most $limit are allowed"
                . ($limit < MAX_REQUEST ? ' (max_json_size)' : ''),
        );
    }
    return $json;
}

# A string as JSON, which is mostly the string itself.
sub _text {
    my ($text, $name) = @_;
    return defined $text && $text =~ /\A[ !#-\[\]-~]*\z/
        ? qq("$text")
        : CPANBridge::JSON::encode(defined $text ? "$text" : undef, $name);
}

# Processes the replies that have arrived; returns how many.
sub _receive {
    my ($self, $connection) = @_;
    my $sent  = $self->{sent};
    my $count = 0;
    while (@{$sent}) {
        my $call = $sent->[0];
        my ($body, $outcome);
        my $is_valid = eval {
            local $SIG{__DIE__} if $SIG{__DIE__};
            $body = $connection->next_reply($self->{bridge}{max_json_size});
            $outcome = _outcome($call, $body) if defined $body;
            1;
        };
        my $error = $is_valid ? undef : _own($@);
        return $count if $is_valid && !defined $body;
        shift @{$sent};
        if ($outcome) {
            $self->_finish($call, $outcome);
            $count++;
            next;
        }
        my ($index) = grep { $self->{calls}[$_] == $call } 0 .. $#{ $self->{calls} };
        $self->{given_up} = 'the connection was given up because of the reply to call ' . ($index + 1)
            . ', which was ' . ($error->error_type eq 'ReplyTooLarge' ? 'too large' : 'not valid')
            . '; this call may have run';
        $self->_fail($call, $error);
        $self->{spoiled} = 1;
        return $count + 1;
    }
    return $count;
}

# The call's outcome by the reply. Dies with a CPANBridge::Error if it is not a reply to this call.
sub _outcome {
    my ($call, $body) = @_;
    if (my $result = _result_of_success($call, $body)) {
        return { success => 1, result => ${$result} };
    }
    my $wrong = sub {
        die CPANBridge::Error->new(
            error_type => 'InvalidReply',
            message    => "The daemon's reply to $call->{module}.$call->{function} is not valid: $_[0]",
        );
    };
    my $reply;
    eval { $reply = CPANBridge::JSON::decode($body); 1 } or $wrong->(_own($@)->message);
    $wrong->('it is not an object') if ref $reply ne 'HASH';
    my $is_success = $reply->{success};
    # The error for a request that could not be read to its end has no id.
    $wrong->('it belongs to another request')
        if defined $reply->{request_id} ? $reply->{request_id} ne $call->{request_id} : $is_success;
    if ($is_success) {
        $wrong->('it has no result') if !exists $reply->{result};
        return { success => 1, result => $reply->{result} };
    }
    $wrong->('it has no error') if !defined $reply->{error} || ref $reply->{error};
    my %outcome = (success => 0);
    for my $field (qw(error error_type traceback retry_after)) {
        $outcome{$field} = $reply->{$field} if defined $reply->{$field};
    }
    $outcome{error_type} = 'UnknownError' if !defined $outcome{error_type};
    return \%outcome;
}

# A reference to the result, if the text around it is what the daemon puts around the result of this
# call; else undef. If the JSON between those two ends is one whole value, there is no other way to read the
# reply; so they need not be decoded, which takes most of the time of a small reply. execution_info is
# not checked.
sub _result_of_success {
    my ($call, $body) = @_;
    my $end = qq(,"module":"$call->{module}","function":"$call->{function}","request_id":"$call->{request_id}")
        . ',"execution_info":{';
    my $length = rindex($body, $end) - length RESULT;
    return undef
        if $length <= 0
        || substr($body, 0, length RESULT) ne RESULT
        || substr($body, $length + length(RESULT) + length $end) !~ /\A[ -z|~]*\},"success":true\}\z/;
    my $result;
    return \$result if eval { $result = CPANBridge::JSON::decode(substr $body, length RESULT, $length); 1 };
    _own($@);
    return undef;
}

sub _finish {
    my ($self, $call, $outcome) = @_;
    my ($started) = delete @{$call}{qw(started sent_at)};
    $started = $self->{started} if !defined $started;
    $call->{duration} = CPANBridge::Clock::now() - $started;
    $call->{outcome}  = $outcome;
    return;
}

sub _fail {
    my ($self, $call, $error) = @_;
    $self->_finish($call, { success => 0, error => $error->message, error_type => $error->error_type });
    return;
}

sub _fail_with {
    my ($self, $call, $type, $message) = @_;
    my $name = join '.', map { defined $_ ? $_ : '?' } @{$call}{qw(module function)};
    $self->_fail($call, CPANBridge::Error->new(error_type => $type, message => "$name: $message"));
    return;
}

sub _time_out {
    my ($self, $connection) = @_;
    my $seconds = $self->{timeout};
    for my $call (splice @{ $self->{sent} }) {
        my $fate = $call->{sent_at} <= $connection->written_bytes
            ? 'the call may have run, or may still run'
            : 'the call was not sent';
        $self->_fail_with($call, 'RequestTimeout', "no reply within $seconds s; $fate");
    }
    $self->_fail_with($_, 'RequestTimeout', "not sent within $seconds s") for splice @{ $self->{waiting} };
    $self->{spoiled} = 1;
    return;
}

# A connection has ended with calls outstanding: each is either sent again or lost.
sub _settle {
    my ($self, $connection, $finished) = @_;
    my $fate = delete $self->{given_up};
    $fate = 'the connection was lost before the reply; the call may have run' if !defined $fate;
    my $is_drained = defined $connection->end && $connection->end eq 'drained';
    my @again;
    for my $call (splice @{ $self->{sent} }) {
        if ($is_drained || $call->{sent_at} > $connection->written_bytes) {
            push @again, $call;
        }
        else {
            $self->_fail_with($call, 'WorkerLost', $fate);
        }
    }
    unshift @{ $self->{waiting} }, @again;
    return if !@{ $self->{waiting} };
    if (CPANBridge::Clock::now() >= $self->{deadline}) {
        $self->_fail_with($_, 'RequestTimeout', "the call was not run within $self->{timeout} s")
            for splice @{ $self->{waiting} };
        return;
    }
    # A limit on new connections, if each ends before any reply.
    $self->{fruitless} = $finished ? 0 : $self->{fruitless} + 1;
    if ($self->{fruitless} > $self->{bridge}{retry_count} + 1) {
        $self->_fail_with($_, 'ShuttingDown', 'the daemon takes no requests; the call was not run')
            for splice @{ $self->{waiting} };
        return;
    }
    $self->{state}{retries} += @again;
    $self->_pause($self->{fruitless} - 1) if $self->{fruitless} > 1;
    return;
}

1;

__END__

=head1 NAME

CPANBridge::Exchange - runs a batch of calls

=head1 DESCRIPTION

Requests are sent ahead of the replies, up to 128 calls at a time, while replies are read as they
come. One deadline holds for everything: connecting, sending, waiting, reading. Only the replies to what was sent are waited for
a little longer, because the daemon answers at the deadline, with the reason.

A connection may end before all replies have arrived. If the daemon has sent that it read no further request,
or a request was not completely sent, the call was certainly not run, and is sent again on a new
connection. Any other call may have run: it is not repeated, and ends with C<WorkerLost>.

=head1 METHODS

=over

=item new($bridge, $perl_caller)

Takes the L<CPANBridge>, and the caller's name. The timeout starts to run.

=item run(@calls)

Sets every call's C<outcome>, C<duration> and C<request_id>.

=back

=cut
